-- get_strict: read one value and record the read at once, so that all processes share one exact LRU order.
-- KEYS
--   meta      HASH    <tag>:meta
--   size      HASH    <tag>:size
--   new       ZSET    <tag>:new
--   hot       ZSET    <tag>:hot
--   warm      ZSET    <tag>:warm
--   cold      ZSET    <tag>:cold
--   ghost     ZSET    <tag>:ghost
--   deferred  LIST    <tag>:deferred
--   entry     STRING  <tag>:e:<key>
--   epochs    STRING  <tag>:epochs
--   tags      ZSET    <tag>:tags
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   key       text    stored name of the key
--   misses    int     misses to count if there is no value: 1, or 0 if the caller counts the miss
-- RETURNS
--   {1, entry}          a value that was not invalidated
--   {2}                 no value
--   {3, entry, epochs}  the entry or the epochs cannot be decoded: a miss, counted as corrupt; the caller reports
--                       the fault
--   {4}                 the key of the entry has a wrong type: a miss, counted as corrupt
--   {0}                 the cache has no settings, or its entries are being moved to another layout; nothing done
-- REPEAT  a second delivery counts the read or the miss a second time
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(log N) for N entries; after the limits were lowered, O((moves + evictions) log N). A call evicts at most
--         512 entries, and moves at most 512 out of each tier
--@include corrupt
--@include whole_number
--@include index
--@include header
--@include live
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, ENTRY, EPOCHS, TAGS = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local KEY, MISSES = ARGV[1], tonumber(ARGV[2])

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then return refusal end
local found = I.call('MGET', ENTRY, EPOCHS)
local version, cost_ms, undecodable = live(I.call, found[1], found[2], TAGS)
undecodable = undecodable or (not found[1] and I.call('EXISTS', ENTRY) == 1)
if not version then
  if undecodable or MISSES > 0 then
    I.counters = {MISSES, 0, undecodable and 1 or 0}
    I.save()
  end
  if not undecodable then return {2} end
  return found[1] and {3, found[1], found[2] or '0 0 0'} or {4}
end
--@include reads
I.record_reads({KEY}, {1})
if #cost_ms <= 15 then I.counters = {0, tonumber(cost_ms), 0} end  -- callers cannot decode a longer number
I.balance()
I.delete_dropped()
I.save()
return {1, found[1]}
