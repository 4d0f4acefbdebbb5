-- register: add an instance, or change a registered one. A change keeps the load, health and measurements, but
-- clears a missed heartbeat.
-- KEYS
--   state       HASH  agentperf:{lb:<type>}:state
--   ready       ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due         ZSET  agentperf:{lb:<type>}:due
--   waitq       ZSET  agentperf:{lb:<type>}:waitq
--   ids         ZSET  agentperf:{lb:<type>}:ids
--   ring        ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   id          text  the instance
--   wanted      text  strategy that the pool must have; '-': any strategy, or least_loaded for a new pool
--   cap         int   max concurrent leases
--   weight      text  weight, decimal, at least 0
--   labels      text  labels, comma-separated, or '-' for none
--   on          text  flags to set, comma-separated, or '-' for none. The flags `removed` and `heartbeat_missed` are
--                     cleared. The flags `metered` and `rate_limited` are computed again. All other flags stay
--   ewma_us     int   initial smoothed response time, us; 0 when not known
--   silence_ms  int   time without a heartbeat after which the instance is disabled, ms; 0: no heartbeat is expected
--   points      text  positions of the instance on the ring, 0 to 2^48 - 1 each, separated by spaces
--   rpm         text  max requests per minute, decimal; 0: no limit
--   tpm         text  max tokens per minute, decimal; 0: no limit
--   settings    text  value of #settings for a new pool; used for an existing pool only when chosen is 1
--   chosen      int   1 when the settings replace those of an existing pool, else 0
--   until_ms    int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, strategy, born, before, first}   added. born: creation time of the pool, us. If an earlier reply had a
--     different time, the pool has been lost or deleted since then. before: the settings that were replaced, empty if
--     none were. first: 1 if the pool had no instance before, else 0
--   {0, strategy, born, before, 0}       changed
--   {-2, strategy}                the pool has another strategy
--   {-3, fact}  {-4, field}  {-7, strategy}   as in records.lua
--   {-6, now_ms}    the request came after until_ms; nothing was changed
-- REPEAT  results in the same state; a copy that arrives after until_ms is refused, since it could undo a later change
-- ERRORS  none
-- COST    O(log N + labels + points log R) for N instances and a ring of R points. It also processes at most 16 due
--         timers, and grants units to at most 16 waiters. With slow_start, it also searches up to 1024 records for a
--         healthy, warm instance, in the order of registration
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local ID, WANTED, CAP, WEIGHT, LABELS = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local ON, EWMA_US, SILENCE_MS, POINTS, RPM, TPM = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local SETTINGS, CHOSEN, UNTIL_MS = ARGV[12], ARGV[13], ARGV[14]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local EXPIRIES, LOOK, LOOKS = 16, 64, 16

-- Return whether the pool has a healthy, warm instance that was registered at least slow_start_ms ago. Without such an
-- instance, the whole fleet is just starting, and a new instance does not warm up. Drained or dead instances of an
-- earlier fleet do not count as healthy.
local function has_warm_instance(pool)
  local before_us = format('%.0f', pool.now_us - pool.settings.slow_start_ms * 1000)
  for look = 0, LOOKS - 1 do
    local some = call('ZRANGEBYSCORE', IDS, '-inf', before_us, 'LIMIT', look * LOOK, LOOK)
    for _, record in ipairs(#some > 0 and call('HMGET', STATE, unpack(some)) or {}) do
      local flags = record and field(record, 'flags')
      if flags then
        local usable, unhealthy, warming = pool.counts(pool.flags_of(flags))
        if usable == 1 and unhealthy == 0 and warming == 0 then return true end
      end
    end
    if #some < LOOK then return false end
  end
  return false
end

local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local known = call('HMGET', STATE, '#pool', ID, '#born', '#settings')
call('ZCARD', RING)
check_types(LABELS)
local refused, strategy = opened(known[1])
if refused then return refused end
if WANTED ~= '-' and not rules(POOL .. WANTED) then return {UNKNOWN_STRATEGY, WANTED} end
local first = call('ZCARD', IDS) == 0 and 1 or 0
if first == 0 and strategy then
  if WANTED ~= '-' and WANTED ~= strategy then return {OTHER_STRATEGY, strategy} end
elseif WANTED ~= '-' or not strategy then
  -- No instance is registered, or the server has evicted the hash `state` but not the other keys. In both cases, the
  -- caller may choose the strategy.
  strategy = WANTED ~= '-' and WANTED or DEFAULT_STRATEGY
end
local born = whole_number(known[3], now_us)
if not born then return corrupt('#born') end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
if pool.first_corrupt({ID}) then return corrupt(ID) end
pool.expire(EXPIRIES)
local r = pool.read(ID)

local before = ''
local settings = known[4]
if not settings or (CHOSEN == '1' and settings ~= SETTINGS) then
  before, settings = settings or '', SETTINGS
  call('HSET', STATE, '#settings', settings)
end
local fact = pool.pool_fact(strategy, settings)
if fact ~= known[1] or settings ~= known[4] then
  call('HSET', STATE, '#pool', fact)
  pool = maintenance(now_us)
end
if not known[3] then call('HSET', STATE, '#born', format('%.0f', born)) end
local is_newcomer = pool.settings.slow_start_ms > 0 and has_warm_instance(pool)
local added = call('ZADD', IDS, 'NX', format('%.0f', pool.now_us), ID)
r = r or pool.new(ID)
pool.relabel(r, LABELS)
r.cap, r.weight = tonumber(CAP), WEIGHT
if r.ewma_us == 0 and EWMA_US ~= '0' then r.ewma_us, r.ewma_at_ms = tonumber(EWMA_US), pool.now_ms end
pool.set(r, 'removed', false)
pool.set(r, 'heartbeat_missed', false)
for flag in pairs(pool.flags_of(ON)) do pool.set(r, flag, true) end
pool.set(r, 'metered', RPM ~= '0' or TPM ~= '0')
if r.extra or r.flags.metered then
  pool.extra(r).rpm, r.extra.tpm = RPM, TPM
  pool.limit_rate(r)
end
if r.extra or SILENCE_MS ~= '0' then pool.extra(r).heartbeat_ms = tonumber(SILENCE_MS) end
if is_newcomer and added == 1 then pool.warm_up(r) end
pool.store(r)
if added == 1 then pool.add_event('registered', ID) end
if SILENCE_MS == '0' then
  call('ZREM', DUE, 'H:' .. ID)
else
  call('ZADD', DUE, format('%.0f', pool.now_ms + SILENCE_MS), 'H:' .. ID)
end
local _, how = rules(POOL .. strategy)
if how == 'ring' then
  local n = 0
  for point in string.gmatch(POINTS, '%d+') do
    n = n + 1
    call('ZADD', RING, point, ID .. '#' .. n)
  end
end
pool.dispatch()
pool.reschedule()
if first == 1 then pool.update_expiry() end
return {added, strategy, born, before, first}
