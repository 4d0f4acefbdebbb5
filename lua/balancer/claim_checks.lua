-- claim_checks: claim the active checks that are due. The first caller gets them, so processes share the work.
-- KEYS
--   state       HASH  agentperf:{lb:<type>}:state
--   ids         ZSET  agentperf:{lb:<type>}:ids
--   checks      ZSET  agentperf:{lb:<type>}:checks
-- ARGV
--   interval_ms int   from one check of an instance to its next, ms
--   count       int   max checks to claim now
-- RETURNS
--   {1, now_ms, next_ms, id, record, id, record ...}   next_ms: until the next one is due, ms, at most the interval
--   {-3, fact}  {-4, field}   as in pool.lua
-- REPEAT  claims others that are due: a lost reply skips one check of the instances in it
-- ERRORS  none
-- COST    O(count log N), and O(N log N) after instances were registered or removed
local STATE, IDS, CHECKS = KEYS[1], KEYS[2], KEYS[3]
local INTERVAL_MS, COUNT = ARGV[1], ARGV[2]
--@include strategies
--@include records
--@include whole_records

local fact = call('HGET', STATE, '#pool')
local refused = opened(fact)
if refused then return refused end
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
local known, registered = call('ZCARD', CHECKS), call('ZCARD', IDS)
local newcomers = known ~= registered and call('ZDIFF', 2, IDS, CHECKS) or {}
table.sort(newcomers)
local claimable = call('ZRANGEBYSCORE', CHECKS, '-inf', format('%.0f', now_ms), 'LIMIT', 0, COUNT)
for i = 1, math.min(#newcomers, tonumber(COUNT)) do claimable[#claimable + 1] = newcomers[i] end
for i, record in ipairs(#claimable > 0 and call('HMGET', STATE, unpack(claimable)) or {}) do
  if record and not read_record(record) then return corrupt(claimable[i]) end
end
call('ZREM', CHECKS, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
if known ~= registered then
  -- Newcomers are due at once: ZUNIONSTORE gives them the time 0.
  call('ZUNIONSTORE', CHECKS, 2, CHECKS, IDS, 'WEIGHTS', 1, 0, 'AGGREGATE', 'MAX')
end
local due = call('ZRANGEBYSCORE', CHECKS, '-inf', format('%.0f', now_ms), 'WITHSCORES', 'LIMIT', 0, COUNT)
local ids = {}
for i = 1, #due, 2 do
  -- An interval after it was due, so that being late now does not make all later ones late.
  local next_ms = tonumber(due[i + 1]) + INTERVAL_MS
  if next_ms <= now_ms then next_ms = now_ms + INTERVAL_MS end
  if call('ZSCORE', IDS, due[i]) then
    call('ZADD', CHECKS, format('%.0f', next_ms), due[i])
    ids[#ids + 1] = due[i]
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
