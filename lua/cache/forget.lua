-- forget: remove entries from a closed shard after another shard has adopted them.
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
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   names...    text    the stored names, at most 256
-- RETURNS
--   {1, entries, bytes, cleared}  left in the shard: entries, their bytes, and clears whose values are not freed yet
--   {0}                 the shard has no settings, or is not closed; nothing done
-- REPEAT  a second or late delivery finds the entries gone: a closed shard gets no new ones
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(names log N) for N entries; also frees at most 256 cleared values
--@include corrupt
--@include whole_number
--@include index
--@include cleared
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, ENTRIES = KEYS[7], KEYS[8], 8

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, true)
if not I then return refusal end
if not redis.call('HGET', META, 'frozen') then return {0} end
for i = 1, #ARGV do
  if I.call('HEXISTS', SIZE, ARGV[i]) == 1 then I.remove(ARGV[i]) else I.call('UNLINK', KEYS[ENTRIES + i]) end
end
I.delete_dropped()
if I.deferred_count > 0 then free_cleared(I, 256) end
I.save()
return {1, I.n, math.max(0, I.bytes), I.deferred_count}
