-- release_claim: release a compute lease without storing a value. If the computation failed, its error is kept for the
-- callers that waited for this lease; a later caller computes again. If there is a stale value, the error is kept until
-- that value expires. Until then, readers see that computing fails, and background refreshes see when the computation
-- last failed.
-- KEYS
--   lease     HASH    <tag>:l:<key>
--   entry     STRING  <tag>:e:<key>
--   epochs    STRING  <tag>:epochs
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   token     text    token of the lease
--   outcome   text    'failed' or 'given_up'
--   error     text    for 'failed': "<type> <message>", or one space if the value cannot be stored
--   error_ms  int     min time for which the error is kept, ms. If there is a stale value that never expires, the error
--                     is kept for at least a day
--   bus       text    channel of invalidations
--   origin    text    id of the releasing process; messages on the bus contain it
--   key       text    stored name of the key
--   tagged    int     1 if the value has tags, else 0
-- RETURNS
--   {1}                 released
--   {2}                 released, but the computed value may be outdated: after the claim, the cache was cleared or, if
--                       the value has tags, any tag of the cache was invalidated. Also returned if the text in epochs
--                       cannot be parsed
--   {-1}                the lease was no longer held; nothing done
-- REPEAT  a second delivery finds the token gone
-- ERRORS  none
-- COST    O(1)
--@include whole_number
local LEASE, ENTRY, EPOCHS = KEYS[1], KEYS[2], KEYS[3]
local TOKEN, OUTCOME, ERROR, ERROR_MS, BUS, ORIGIN, KEY = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local TAGGED = ARGV[8]
local DAY_MS = 86400000                  -- min time for which the error is kept if the stale value never expires

local held = redis.call('HMGET', LEASE, 'token', 'waited', 'version')
if held[1] ~= TOKEN then return {-1} end
local claimed, epochs = whole_number(held[3]) or -1, redis.call('MGET', EPOCHS)[1]
local cleared, invalidated = string.match(epochs or '-1 -1 ', '^(%-?%d+) (%-?%d+) ')
if TAGGED ~= '1' then invalidated = cleared end
local current = cleared and tonumber(cleared) <= claimed and tonumber(invalidated) <= claimed
redis.call('UNLINK', LEASE)
if OUTCOME == 'failed' then
  local time, left_ms = redis.call('TIME'), redis.call('PTTL', ENTRY)
  if left_ms == -1 then left_ms = DAY_MS end
  redis.call('HSET', LEASE, 'failed', TOKEN, 'error', ERROR, 'failed_ms',
    string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000)))
  redis.call('PEXPIRE', LEASE, string.format('%d', math.max(tonumber(ERROR_MS), left_ms)))
end
if held[2] then redis.call('SPUBLISH', BUS, (OUTCOME == 'failed' and 'x' or 'r') .. ' 0 ' .. ORIGIN .. ' ' .. KEY) end
return {current and 1 or 2}
