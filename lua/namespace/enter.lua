-- enter: record that a process uses a resource, so that operators can list all resources.
-- KEYS
--   resources  ZSET  agentperf:resources
-- ARGV
--   resource   text  <service>:<name>
-- RETURNS
--   1         recorded
-- REPEAT  a second delivery updates the time of use
-- ERRORS  none
-- COST    O(log N) for N resources
local RESOURCES = KEYS[1]
local RESOURCE = ARGV[1]

local clock = redis.call('TIME')
redis.call('ZADD', RESOURCES, string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000)), RESOURCE)
return 1
