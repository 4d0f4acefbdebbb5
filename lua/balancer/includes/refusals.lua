-- The reply to a request that gets no lease. Needs pool.lua and maintenance.lua.

-- Return {0, retry_ms, registered, waiting, disabled, unhealthy, rate_limited}; acquire.lua describes these values.
-- A caller that has not called `maintenance` passes nil or false for `pool`.
local function refusal_reply(pool, ids, now_us)
  local retry_ms = retry_after_ms(floor(now_us / 1000))
  local away, registered = call('ZCARD', string.sub(READY, 1, -6) .. 'away'), call('ZCARD', ids)
  if away > 0 then retry_ms = (pool or maintenance(now_us)).back_after_ms() or retry_ms end
  local counts = call('HMGET', STATE, '#usable', '#unhealthy')
  local usable, unhealthy = whole_number(counts[1]) or 0, whole_number(counts[2]) or 0
  local disabled, rate_limited = math.max(0, registered - usable), math.max(0, away - unhealthy)
  return {NOTHING, retry_ms, registered, call('ZCARD', WAITQ), disabled, unhealthy, rate_limited}
end
