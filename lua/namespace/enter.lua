-- enter: note that a process uses a resource, so that operators can list what there is.
-- KEYS
--   resources      ZSET  agentperf:resources
-- ARGV
--   resource       text  <service>:<name>
-- RETURNS
--   1              noted
-- REPEAT   a second delivery renews the time
-- ERRORS   none
-- COST     O(log N) in resources
local RESOURCES = KEYS[1]
local RESOURCE = ARGV[1]

local clock = redis.call('TIME')
redis.call('ZADD', RESOURCES, string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000)), RESOURCE)
return 1
