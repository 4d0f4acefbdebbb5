-- cancel_puts: cancel requests of put.lua and pop.lua that the caller has given up. Copies of such a request that
-- arrive later do nothing.
-- KEYS
--   meta      HASH  <tag>:meta
--   resent    ZSET  <tag>:resent
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   until_ms  int   server time after which these requests are refused in any case, ms
--   ids...    text  the request ids; the caller sends at most 256
-- RETURNS
--   {1}                 cancelled; a request that was executed before keeps its effect
-- REPEAT  a second delivery cancels the same requests again
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(ids log N) for N requests in resent
--@include corrupt
--@include whole_number
local META, RESENT = KEYS[1], KEYS[2]
local UNTIL_MS, IDS = tonumber(ARGV[1]), 2

local call = redis.call
local resent = whole_number(call('HGET', META, 'resent'), 0)
if not resent then return corrupt(META, 'resent that is no whole number') end
call('ZCARD', RESENT)
resent = math.max(resent, UNTIL_MS)
local time = call('TIME')
call('ZREMRANGEBYSCORE', RESENT, '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
for i = IDS, #ARGV do call('ZADD', RESENT, UNTIL_MS, ARGV[i]) end
call('PEXPIREAT', RESENT, string.format('%d', resent + 1))
call('HSET', META, 'resent', string.format('%d', resent))
return {1}
