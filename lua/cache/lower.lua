-- lower: give a shard of a new layout more of its limits, as the old layout empties.
-- KEYS
--   meta     HASH  <tag>:meta
--   marks    HASH  <tag>:marks
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   entries  int   entries of the limit of this shard that the old layout still uses; -1 if the old layout is empty
--   bytes    int   the same, in bytes
-- RETURNS
--   {1}      lowered, or no entries move here any more
-- REPEAT  a late delivery never gives limits back to the old layout
-- ERRORS  none
-- COST    O(1)
--@include whole_number
local META, MARKS = KEYS[1], KEYS[2]
local ENTRIES, BYTES = tonumber(ARGV[1]), tonumber(ARGV[2])

local kept, kept_bytes = string.match(redis.call('HGET', META, 'moving') or '', '^(%d+) (%d+)$')
kept, kept_bytes = whole_number(kept), whole_number(kept_bytes)
if not kept or not kept_bytes then return {1} end
if ENTRIES < 0 then
  redis.call('HSET', META, 'moving', 'done')
  redis.call('UNLINK', MARKS)
else
  kept, kept_bytes = math.min(kept, ENTRIES), math.min(kept_bytes, BYTES)
  redis.call('HSET', META, 'moving', string.format('%d %d', kept, kept_bytes))
end
return {1}
