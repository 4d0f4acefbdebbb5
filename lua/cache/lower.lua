-- lower: reduce the part of a new shard's limits that is reserved for the old layout. This is done after entries have
-- left the old layout; relayout.lua explains layouts.
-- KEYS
--   meta     HASH  <tag>:meta
--   marks    HASH  <tag>:marks
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   entries  int   part of this shard's limit of entries that stays reserved for the old layout; -1 if the old layout
--                  has no entries left
--   bytes    int   part of this shard's limit of bytes that stays reserved; not used if entries is -1
-- RETURNS
--   {1}      done. If no entries are being moved to this shard, nothing was changed
-- REPEAT  a second or late delivery never enlarges the reserved part
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
