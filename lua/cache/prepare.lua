-- prepare: make a shard of a new layout ready for the entries of the old layout; relayout.lua explains layouts.
-- KEYS
--   meta         HASH  <tag>:meta
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   clock        int   the highest clock of the old layout's shards; new versions in this shard are higher
--   entries      int   how many entries of this shard's limit are reserved for the old layout
--   bytes        int   how many bytes of this shard's limit are reserved for the old layout
--   counters...  int   counts of the old layout, with which this shard's counters start: evicted, expired, hot, warm,
--                      cold, misses, saved_ms and corrupt
-- RETURNS
--   {1}          this call or an earlier one has made the shard ready
-- REPEAT  a second or late delivery finds the shard ready
-- ERRORS  CORRUPT if the clock in meta is not a number; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
local META = KEYS[1]
local CLOCK, ENTRIES, BYTES, COUNTERS = tonumber(ARGV[1]), ARGV[2], ARGV[3], 3

local m = redis.call('HMGET', META, 'clock', 'moving')
local clock = whole_number(m[1], 0)
if not clock then return corrupt(META, 'a clock that is no whole number') end
if m[2] then return {1} end
local f = {'clock', string.format('%d', math.max(clock, CLOCK)), 'moving', ENTRIES .. ' ' .. BYTES}
for i, name in ipairs({'evicted', 'expired', 'hot', 'warm', 'cold', 'misses', 'saved_ms', 'corrupt'}) do
  if ARGV[COUNTERS + i] ~= '0' then f[#f + 1] = name; f[#f + 1] = ARGV[COUNTERS + i] end
end
redis.call('HSET', META, unpack(f))
return {1}
