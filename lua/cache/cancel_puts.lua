-- cancel_puts: see to it that no copy of puts that were given up does anything any more, however late it arrives.
-- KEYS
--   meta        HASH    <tag>:meta
--   resent      ZSET    <tag>:resent
-- ARGV
--   until_ms    int     server time, ms, after which put refuses those requests by itself
--   ids...      text    the request ids; the caller bounds them (256)
-- RETURNS
--   {1}         buried; one that was executed before stays so
-- REPEAT   a second delivery finds them buried
-- ERRORS   CORRUPT meta is not ours
-- COST     O(ids log N)
local META, RESENT = KEYS[1], KEYS[2]
local UNTIL_MS, IDS = tonumber(ARGV[1]), 2

local call = redis.call
local resent = tonumber(call('HGET', META, 'resent') or 0)
if not resent then return redis.error_reply('CORRUPT ' .. META .. ' resent that is no number') end
call('ZCARD', RESENT)
resent = string.format('%d', math.max(resent, UNTIL_MS))
local time = call('TIME')
call('ZREMRANGEBYSCORE', RESENT, '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
for i = IDS, #ARGV do call('ZADD', RESENT, UNTIL_MS, ARGV[i]) end
call('PEXPIREAT', RESENT, resent + 1)
call('HSET', META, 'resent', resent)
return {1}
