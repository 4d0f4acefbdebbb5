-- release_claim: release a compute lease without a value. An error is kept for error_ms, for the callers that waited
-- for this lease; a later caller computes again. If there is a stale value, the error is kept as long as that value.
-- The error shows readers that computing fails, and it shows background refreshes when computing last failed.
-- KEYS
--   lease     HASH    <tag>:l:<key>
--   entry     STRING  <tag>:e:<key>
--   epochs    STRING  <tag>:epochs
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   token     text    token of the lease
--   outcome   text    failed or given_up
--   error     text    "<type> <message>" if failed; a blank if the value cannot be stored
--   error_ms  int     how long the error is kept, ms
--   bus       text    channel of invalidations
--   origin    text    the releasing process, which ignores its own messages
--   key       text    stored name of the key
--   tagged    int     1 if the value has tags, else 0
-- RETURNS
--   {1}                 released
--   {2}                 released; since the claim, the cache was cleared, or the value has tags and a tag was
--                     invalidated
--   {-1}                the lease was no longer held
-- REPEAT  a second delivery finds the token gone
-- ERRORS  none
-- COST    O(1)
--@include whole_number
local LEASE, ENTRY, EPOCHS = KEYS[1], KEYS[2], KEYS[3]
local TOKEN, OUTCOME, ERROR, ERROR_MS, BUS, ORIGIN, KEY = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local TAGGED = ARGV[8]
local DAY_MS = 86400000                  -- how long the error is kept if the stale value never expires

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
