-- leave: forget a worker that ends.
-- KEYS
--   seen    ZSET  agentperf:{workers}:seen
--   record  HASH  agentperf:{workers}:w:<worker>
-- ARGV
--   worker  text  name of the worker
-- RETURNS
--   1  the worker is not recorded any longer
-- REPEAT  a second delivery finds no such worker
-- ERRORS  CORRUPT <key>: seen has a wrong type; nothing was removed
-- COST    O(log N + executions) for N workers
--@include corrupt
local SEEN, RECORD = KEYS[1], KEYS[2]
local WORKER = ARGV[1]

local found = redis.call('TYPE', SEEN).ok
if found ~= 'zset' and found ~= 'none' then return corrupt(SEEN, 'a ' .. found) end
redis.call('ZREM', SEEN, WORKER)
redis.call('UNLINK', RECORD)
return 1
