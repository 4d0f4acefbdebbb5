-- release_claim: give a lease back without a value. What went wrong is kept a while for those who waited for this very lease;
-- whoever comes anew computes anew. While there is a stale value to stand in, it is kept for as long as that lives: by it
-- readers know that computing anew fails, and refreshers when it last did.
-- KEYS
--   lease       HASH    <tag>:l:<key>
--   entry       STRING  <tag>:e:<key>
-- ARGV
--   token       text    of the lease
--   outcome     text    failed or given_up
--   error       text    "<type> <message>" if failed; a blank if the value cannot be stored
--   error_ms    int     how long it is kept, ms
--   bus         text    channel of invalidations
--   origin      text    who releases, for its own ears
--   key         text    its stored name
-- RETURNS
--   {1}         given back
--   {-1}        it was no longer held
-- REPEAT   a second delivery finds the token gone
-- ERRORS   none
-- COST     O(1)
local LEASE, ENTRY = KEYS[1], KEYS[2]
local TOKEN, OUTCOME, ERROR, ERROR_MS, BUS, ORIGIN, KEY = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local DAY_MS = 86400000                  -- where the stale value never expires

local held = redis.call('HMGET', LEASE, 'token', 'waited')
if held[1] ~= TOKEN then return {-1} end
redis.call('UNLINK', LEASE)
if OUTCOME == 'failed' then
  local time, left_ms = redis.call('TIME'), redis.call('PTTL', ENTRY)
  if left_ms == -1 then left_ms = DAY_MS end
  redis.call('HSET', LEASE, 'failed', TOKEN, 'error', ERROR, 'failed_ms',
    string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000)))
  redis.call('PEXPIRE', LEASE, math.max(tonumber(ERROR_MS), left_ms))
end
if held[2] then redis.call('SPUBLISH', BUS, (OUTCOME == 'failed' and 'x' or 'r') .. ' 0 ' .. ORIGIN .. ' ' .. KEY) end
return {1}
