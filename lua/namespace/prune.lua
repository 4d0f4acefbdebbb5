-- prune: remove a resource that no longer exists from the list of resources.
-- KEYS
--   resources  ZSET  agentperf:resources
-- ARGV
--   resource   text  <service>:<name>
--   before_ms  int   the resource stays if a process opened it after this time, ms; 0: a minute ago
-- RETURNS
--   1         removed, or not listed
--   0         a process has opened it since
-- REPEAT  finds no such resource
-- ERRORS  none
-- COST    O(log N); N resources
local RESOURCES = KEYS[1]
local RESOURCE, BEFORE_MS = ARGV[1], tonumber(ARGV[2])

local clock = redis.call('TIME')
if BEFORE_MS == 0 then BEFORE_MS = clock[1] * 1000 + math.floor(clock[2] / 1000) - 60000 end
local opened_ms = tonumber(redis.call('ZSCORE', RESOURCES, RESOURCE) or 0)
if opened_ms > BEFORE_MS then return 0 end
redis.call('ZREM', RESOURCES, RESOURCE)
return 1
