-- forget: remove the names, all-time counts and raw samples of an agent and of its spans and measures.
-- KEYS
--   agents  ZSET  agentperf:{metrics:<shard>}:agents
--   parts   ZSET  agentperf:{metrics:<shard>}:parts:<agent>
--   total   HASH  agentperf:{metrics:<shard>}:total:<agent>
--   latest  LIST  agentperf:{metrics:<shard>}:latest:<agent>
--   slow    ZSET  agentperf:{metrics:<shard>}:slow:<agent>
--   The keys total, latest and slow of each span and measure are computed here, under the same hash tag. Slices remain
--   until they expire.
-- ARGV
--   agent   text  percent-encoded
-- RETURNS
--   {1, n}  removed, with n spans and measures
--   {0, 0}  there is no such agent
-- REPEAT  a second delivery finds no such agent
-- ERRORS  CORRUPT <key>: agents or parts has a wrong type; nothing was removed
-- COST    O(spans); flush.lua limits the spans of an agent to max_parts, which is 200
--@include corrupt
local AGENTS, PARTS, TOTAL, LATEST, SLOW = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local AGENT = ARGV[1]

local call = redis.call
for _, index in ipairs({AGENTS, PARTS}) do
  local found = call('TYPE', index).ok
  if found ~= 'zset' and found ~= 'none' then return corrupt(index, 'a ' .. found) end
end
local names = call('ZRANGE', PARTS, 0, -1)
if not call('ZSCORE', AGENTS, AGENT) then return {0, 0} end
for _, name in ipairs(names) do call('UNLINK', TOTAL .. name, LATEST .. name, SLOW .. name) end
call('UNLINK', TOTAL, LATEST, SLOW)
call('UNLINK', PARTS)  -- the indexes come last: a repeat of an aborted call finds the remaining keys through them
call('ZREM', AGENTS, AGENT)
return {1, #names}
