-- history: read the history of a cache or a pool, and the server's clock.
-- KEYS
--   history  HASH  agentperf:{<service>:<name>}:history
-- ARGV
--   none
-- RETURNS
--   {now_ms, field, value, ...}  all fields; lua/includes/history.lua describes them
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: the key has a wrong type
-- COST    O(1) for at most 464 fields: 90 + 180 + 192 slots, and the fields claimed and totals
--@include corrupt
local HISTORY = KEYS[1]

local stored = redis.pcall('HGETALL', HISTORY)
if stored.err then return corrupt(HISTORY, 'something else (' .. stored.err .. ')') end
local clock = redis.call('TIME')
table.insert(stored, 1, clock[1] * 1000 + math.floor(clock[2] / 1000))
return stored
