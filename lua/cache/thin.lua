-- thin: evict entries of a shard, in the order of its policy, until the shard is within the given limits.
-- KEYS
--   meta      HASH  <tag>:meta
--   size      HASH  <tag>:size
--   new       ZSET  <tag>:new
--   hot       ZSET  <tag>:hot
--   warm      ZSET  <tag>:warm
--   cold      ZSET  <tag>:cold
--   ghost     ZSET  <tag>:ghost
--   deferred  LIST  <tag>:deferred
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   entries   int   max entries. If the shard's own limit is lower, that limit applies
--   bytes     int   max bytes of all entries; 0: the shard's own limit applies
-- RETURNS
--   {1, evicted}        number of entries that this call evicted, at most 512. Repeat the call until this number is 0
--   {0}                 the shard has no settings; nothing done
-- REPEAT  a second or late delivery evicts further entries, until the shard is within the limits
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(evictions log N) for N entries
--@include corrupt
--@include whole_number
--@include index
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED = KEYS[7], KEYS[8]
local ENTRIES, BYTES = tonumber(ARGV[1]), tonumber(ARGV[2])

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, true)
if not I then return refusal end
I.total = math.max(1, math.min(I.total, ENTRIES))
if BYTES > 0 then I.max_bytes = BYTES end
if I.n <= I.total and (I.max_bytes == 0 or I.bytes <= I.max_bytes) then return {1, 0} end
I.promoted = true
I.balance()
I.delete_dropped()
I.save()
return {1, I.evicted}
