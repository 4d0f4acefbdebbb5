-- register: add an instance, or change one that is there; its load, health and measurements stay.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   id          text   the instance
--   wanted      text   strategy, or - for the pool's own (least_loaded for a new pool)
--   cap         int    units that may be leased at once
--   weight      text   decimal, at least 0
--   labels      text   a,b or - for none
--   on          text   flags to set, letters of pool.lua; the others stay
--   ewma_us     int    response time to start from, us; 0 when not known
--   silence_ms  int    missing heartbeats this long make it silent; 0: none are expected
--   points      text   its points on the ring, numbers of 48 bits
--   rpm         text   requests a minute it takes, decimal; 0: any number
--   tpm         text   tokens a minute it takes, decimal; 0: any number
--   settings    text   of the pool, as pool.lua has them: for a new pool, or when they are chosen
--   chosen      int    1 when the pool is to have these settings, whatever it had
--   until_ms    int    server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, strategy, born, before}   added; born: when the pool was founded, us: another number tells that it was lost in
--                                 between; before: the settings it had, empty unless they were replaced
--   {0, strategy, born, before}   changed
--   {-2, strategy}  {-3, fact}  {-4, field}   other strategy; other schema; a field we did not write
--   {-6, now_ms}    too late; nothing done
-- REPEAT  the same state; after until_ms nothing, so that no late copy undoes what was done since
-- ERRORS  none
-- COST    O(log N + labels + points log ring), and the hand-offs to at most 16 waiters; with a slow start, a look through at
--         most 1024 records for one who is fit and warm, the longest registered first
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local ID, WANTED, CAP, WEIGHT, LABELS = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local ON, EWMA_US, SILENCE_MS, POINTS, RPM, TPM = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local SETTINGS, CHOSEN, UNTIL_MS = ARGV[12], ARGV[13], ARGV[14]
--@include pool
--@include health
--@include maintenance

local EXPIRIES, LOOK, LOOKS = 16, 64, 16

-- Whether somebody who is fit and warm has been there for as long as warming up takes. A fleet that starts is not made up of
-- newcomers, whoever is left behind of the one before it, drained or dead.
local function has_elders(all)
  local before_us = format('%.0f', all.now_us - all.settings().ramp_ms * 1000)
  for look = 0, LOOKS - 1 do
    local some = call('ZRANGEBYSCORE', IDS, '-inf', before_us, 'LIMIT', look * LOOK, LOOK)
    for _, record in ipairs(#some > 0 and call('HMGET', STATE, unpack(some)) or {}) do
      local flags = match(select(8, match(record or '', RECORD)) or '', '^%S+')
      if flags and not string.find(flags, '[sudrechw]') then return true end
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
check(LABELS)
local strategy = match(known[1] or '', POOL)
if known[1] and not strategy then return {OTHER_SCHEMA, known[1]} end
if call('ZCARD', IDS) > 0 then
  if WANTED ~= '-' and WANTED ~= strategy then return {OTHER_STRATEGY, strategy} end
elseif WANTED ~= '-' or not strategy then
  -- Nobody is registered: the pool is new, or may become another.
  strategy = WANTED ~= '-' and WANTED or 'least_loaded'
end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep(now_us)
if known[2] and not all.read(ID) then return {CORRUPT, ID} end
all.reap(EXPIRIES)
local r = all.read(ID)

local before = ''
local settings = known[4]
if not settings or (CHOSEN == '1' and settings ~= SETTINGS) then
  before, settings = settings or '', SETTINGS
  call('HSET', STATE, '#settings', settings)
end
local pool = all.pool_fact(strategy, settings)
if pool ~= known[1] or settings ~= known[4] then
  call('HSET', STATE, '#pool', pool)
  all = upkeep(now_us)
end
local born = known[3] or format('%.0f', all.now_us)
if not known[3] then call('HSET', STATE, '#born', born) end
local newcomer = all.settings().ramp_ms > 0 and has_elders(all)
local added = call('ZADD', IDS, 'NX', format('%.0f', all.now_us), ID)
if not r then
  r = {
    id = ID, load = 0, lim = 0, seq = '0', fence = 0, peak = 0, labels = '-', flags = '-', ewma_us = 0, ewma_ms = 0, served = 0,
    failed = 0, fails = 0, old_load = 0, old_cap = 0, old_flags = 'r',
  }
end
all.relabel(r, LABELS)
r.cap, r.weight = tonumber(CAP), WEIGHT
if r.ewma_us == 0 and EWMA_US ~= '0' then r.ewma_us, r.ewma_ms = tonumber(EWMA_US), all.now_ms end
all.set(r, 'r', false)
all.set(r, 's', false)
for flag in string.gmatch(ON, '%a') do all.set(r, flag, true) end
all.set(r, 'l', RPM ~= '0' or TPM ~= '0')
if r.more or all.has(r, 'l') then
  all.more(r).rpm, r.more.tpm = RPM, TPM
  all.park(r)
end
if r.more or SILENCE_MS ~= '0' then all.more(r).beat_ms = tonumber(SILENCE_MS) end
if newcomer and added == 1 then all.warm_up(r) end
all.store(r)
if added == 1 then all.tell('registered', ID) end
if SILENCE_MS == '0' then
  call('ZREM', DUE, 'H:' .. ID)
else
  call('ZADD', DUE, format('%.0f', all.now_ms + SILENCE_MS), 'H:' .. ID)
end
if strategy == 'consistent_hash' then
  local n = 0
  for point in string.gmatch(POINTS, '%d+') do
    n = n + 1
    call('ZADD', RING, point, ID .. '#' .. n)
  end
end
all.pump()
all.retime()
return {added, strategy, tonumber(born) or 0, before}
