-- workers: list the workers whose last heartbeat is at most keep_ms old.
-- KEYS
--   seen     ZSET  agentperf:{workers}:seen
-- ARGV
--   keep_ms  int   max age of the last heartbeat, ms
-- RETURNS
--   {1, now_ms, worker, seen_ms, worker, seen_ms ...}  seen_ms: time of the worker's last heartbeat, ms since 1970; the
--           oldest heartbeat comes first
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: the key has a wrong type
-- COST    O(log N + M) for N recorded workers, of which M are listed
--@include corrupt
local SEEN = KEYS[1]
local KEEP_MS = tonumber(ARGV[1])

local found = redis.call('TYPE', SEEN).ok
if found ~= 'zset' and found ~= 'none' then return corrupt(SEEN, 'a ' .. found) end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
-- A heartbeat later than `last` was stored before the server's clock was set back. It does not count.
local first, last = string.format('%.0f', now - KEEP_MS), string.format('%.0f', now + KEEP_MS)
local reply = redis.call('ZRANGEBYSCORE', SEEN, first, last, 'WITHSCORES')
table.insert(reply, 1, now)
table.insert(reply, 1, 1)
return reply
