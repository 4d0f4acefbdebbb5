-- lower: let a shard of a new layout use more of its limits, because entries have left the old layout.
-- KEYS
--   meta     HASH  <tag>:meta
--   marks    HASH  <tag>:marks
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   entries  int   the part of this shard's limit of entries that the old layout still uses; -1 if that is empty
--   bytes    int   the same for the limit of bytes
-- RETURNS
--   {1}      done, or entries are no longer being moved to this shard
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
