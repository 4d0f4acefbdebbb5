-- delete: remove entries and their compute leases, so that a value whose computation began earlier is not stored.
-- KEYS
--   meta        HASH    <tag>:meta
--   size        HASH    <tag>:size
--   new         ZSET    <tag>:new
--   hot         ZSET    <tag>:hot
--   warm        ZSET    <tag>:warm
--   cold        ZSET    <tag>:cold
--   ghost       ZSET    <tag>:ghost
--   deferred    LIST    <tag>:deferred
--   entries...  STRING  <tag>:e:<key>, one for each name
--   leases...   HASH    <tag>:l:<key>, one for each name
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   bus         text    channel of invalidations
--   origin      text    id of the deleting process; messages on the bus contain it
--   names...    text    the stored names
-- RETURNS
--   {1, removed, version}  removed is the number of entries that existed
--   {0}                    the cache has no settings, or its entries are being moved to another layout; nothing done
-- REPEAT  a second or late delivery removes the entries again, which only causes misses; a miss is never wrong
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(names log N) for N entries
--@include corrupt
--@include whole_number
--@include index
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, ENTRIES = KEYS[7], KEYS[8], 8
local BUS, ORIGIN, NAMES = ARGV[1], ARGV[2], 2

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then return refusal end
local count, removed = #ARGV - NAMES, 0
I.clock = I.clock + 1
I.removed = I.clock
for i = 1, count do
  local key = ARGV[NAMES + i]
  local freed = I.call('UNLINK', KEYS[ENTRIES + i])        -- also frees a cleared value; `removed` does not count it
  if I.call('HEXISTS', SIZE, key) == 1 then
    removed = removed + freed
    I.remove(key)
  end
  I.call('UNLINK', KEYS[ENTRIES + count + i])
  if I.marks then I.call('HDEL', I.marks, key) end
end
I.delete_dropped()
I.save()
for i = 1, count do I.call('SPUBLISH', BUS, 'd ' .. I.text(I.clock) .. ' ' .. ORIGIN .. ' ' .. ARGV[NAMES + i]) end
return {1, removed, I.clock}
