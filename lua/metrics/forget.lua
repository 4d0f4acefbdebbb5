-- forget: remove an agent and its spans from the index and from the counts of all time.
-- KEYS
--   agents  ZSET  agentperf:{metrics:<shard>}:agents
--   parts   ZSET  agentperf:{metrics:<shard>}:parts:<agent>
--   total   HASH  agentperf:{metrics:<shard>}:total:<agent>
--   recent  ZSET  agentperf:{metrics:<shard>}:recent:<agent>
--   slow    ZSET  agentperf:{metrics:<shard>}:slow:<agent>
--   The same three keys of each span and measure are named here, under the same tag. Slices are left to expire.
-- ARGV
--   agent   text  percent-encoded
-- RETURNS
--   {1, n, 0}        forgotten, with n spans and measures
--   {0, 0, 0}        nobody knows it
--   {-1, key, type}  the key holds another type; nothing was removed
-- REPEAT  nobody knows it any more
-- ERRORS  none
-- COST    O(spans), of which the guard of flush allows some 200
local agents, parts, total, recent, slow = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local agent = ARGV[1]

local call = redis.call
for _, index in ipairs({agents, parts}) do
  local found = call('TYPE', index).ok
  if found ~= 'zset' and found ~= 'none' then return {-1, index, found} end
end
local names = call('ZRANGE', parts, 0, -1)
if not call('ZSCORE', agents, agent) then return {0, 0, 0} end
call('ZREM', agents, agent)
for _, name in ipairs(names) do call('UNLINK', total .. name, recent .. name, slow .. name) end
call('UNLINK', parts, total, recent, slow)
return {1, #names, 0}
