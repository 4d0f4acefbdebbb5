-- claim_checks: take on the active checks that are due. Whoever asks first has them, so processes share the work.
-- KEYS
--   state        HASH  agentperf:{lb:<type>}:state
--   ids          ZSET  agentperf:{lb:<type>}:ids
--   checks       ZSET  agentperf:{lb:<type>}:checks
-- ARGV
--   interval_ms  int   from one check of an instance to its next, ms
--   count        int   most to take on now
-- RETURNS
--   {1, now_ms, next_ms, id, record, id, record ...}   next_ms: until the next one is due, ms, at most the interval
--   {-3, fact}   other schema
-- REPEAT  takes on others that are due: a lost reply leaves out one check of the instances in it
-- ERRORS  none
-- COST    O(count log N), and O(N log N) after instances were registered or removed
local STATE, IDS, CHECKS = KEYS[1], KEYS[2], KEYS[3]
local INTERVAL_MS, COUNT = ARGV[1], ARGV[2]
local call, match, format, floor = redis.call, string.match, string.format, math.floor

local pool = call('HGET', STATE, '#pool')
if pool and not match(pool, '^1 ') then return {-3, pool} end
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
local known, registered = call('ZCARD', CHECKS), call('ZCARD', IDS)
call('ZREM', CHECKS, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
if known ~= registered then
  -- Newcomers are due at once, for ZUNIONSTORE counts a registration as no time at all.
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
local reply = {1, now_ms, wait_ms}
for i, record in ipairs(#ids > 0 and call('HMGET', STATE, unpack(ids)) or {}) do
  reply[#reply + 1] = ids[i]
  reply[#reply + 1] = record or ''
end
return reply
