-- claim_checks: claim active checks that are due. Each check is given to only one caller, so processes share the work.
-- KEYS
--   state        HASH  agentperf:{lb:<type>}:state
--   ids          ZSET  agentperf:{lb:<type>}:ids
--   checks       ZSET  agentperf:{lb:<type>}:checks
-- ARGV
--   interval_ms  int   time from one check of an instance to the next, ms
--   count        int   max checks to claim
-- RETURNS
--   {1, now_ms, next_ms, id, record, id, record ...}   now_ms: the server's time, ms since 1970. next_ms: time until
--     the next check is due, ms, at most interval_ms. id, record: each instance to check. A resting instance is not
--     checked: a check might use up more of its rate limit, and a failed check would count against its health
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  claims other due checks. If a reply is lost, the instances in it miss one check
-- ERRORS  none
-- COST    O(count log N) for N instances. The first call after instances were registered, or after the server's
--         clock was set back, takes O(N log N)
local STATE, IDS, CHECKS = KEYS[1], KEYS[2], KEYS[3]
local INTERVAL_MS, COUNT = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include field
--@include whole_records

local known = call('HMGET', STATE, '#pool', '#claimed')
local refused = opened(known[1])
if refused then return refused end
local claimed_ms = whole_number(known[2], 0)
if not claimed_ms then return corrupt('#claimed') end
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
local scheduled, registered = call('ZCARD', CHECKS), call('ZCARD', IDS)
local newcomers = scheduled ~= registered and call('ZDIFF', 2, IDS, CHECKS) or {}
table.sort(newcomers)
local before_ms = format('%.0f', math.max(now_ms, claimed_ms))
local claimable = call('ZRANGEBYSCORE', CHECKS, '-inf', before_ms, 'LIMIT', 0, COUNT)
for i = 1, math.min(#newcomers, tonumber(COUNT)) do claimable[#claimable + 1] = newcomers[i] end
for i, record in ipairs(#claimable > 0 and call('HMGET', STATE, unpack(claimable)) or {}) do
  if record and not read_record(record) then return corrupt(claimable[i]) end
end
call('ZREM', CHECKS, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
if claimed_ms > now_ms then  -- the clock was set back after the last claim: move all checks back by the difference
  local all = call('ZRANGE', CHECKS, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do call('ZADD', CHECKS, format('%.0f', all[i + 1] - (claimed_ms - now_ms)), all[i]) end
end
call('HSET', STATE, '#claimed', format('%.0f', now_ms))
if scheduled ~= registered then
  -- New instances are due at once: ZUNIONSTORE gives them the score 0.
  call('ZUNIONSTORE', CHECKS, 2, CHECKS, IDS, 'WEIGHTS', 1, 0, 'AGGREGATE', 'MAX')
end
local due = call('ZRANGEBYSCORE', CHECKS, '-inf', format('%.0f', now_ms), 'WITHSCORES', 'LIMIT', 0, COUNT)
local ids = {}
for i = 1, #due, 2 do
  -- The next check is due one interval after the due time of this check, so that delays do not add up.
  local next_ms = tonumber(due[i + 1]) + INTERVAL_MS
  if next_ms <= now_ms then next_ms = now_ms + INTERVAL_MS end
  if call('ZSCORE', IDS, due[i]) then
    call('ZADD', CHECKS, format('%.0f', next_ms), due[i])
    local rest_until_ms = whole_number(field(call('HGET', STATE, '+' .. due[i]) or '', 'rest_until_ms'), 0)
    if not rest_until_ms or rest_until_ms <= now_ms then ids[#ids + 1] = due[i] end
  else
    call('ZREM', CHECKS, due[i])
  end
end
local soonest = call('ZRANGE', CHECKS, 0, 0, 'WITHSCORES')[2]
local wait_ms = soonest and math.max(0, math.min(tonumber(INTERVAL_MS), soonest - now_ms)) or tonumber(INTERVAL_MS)
local reply = {DONE, now_ms, wait_ms}
for i, record in ipairs(#ids > 0 and call('HMGET', STATE, unpack(ids)) or {}) do
  reply[#reply + 1] = ids[i]
  reply[#reply + 1] = record or ''
end
return reply
