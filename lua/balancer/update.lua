-- update: change the registered fields of an instance, and its flags.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   id        text  the instance
--   cap       text  max concurrent leases, or '-' to keep the value
--   weight    text  weight, decimal, or '-' to keep the value
--   labels    text  labels, comma-separated; empty for no labels; '-' to keep them
--   on        text  flags to set, comma-separated, or '-' for none
--   off       text  flags to clear, comma-separated, or '-' for none
--   rpm       text  max requests per minute, decimal; 0: no limit; '-' to keep the value
--   tpm       text  max tokens per minute, decimal; 0: no limit; '-' to keep the value
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, load}   changed. load: current number of leases
--   {0}         no such instance
--   {-3, fact}  {-4, field}   as in records.lua
--   {-6, now_ms}   the request came after until_ms; nothing was changed
-- REPEAT  results in the same state; a copy that arrives after until_ms is refused, since it could undo a later change
-- ERRORS  none
-- COST    O(log N) for N instances. It also processes at most 16 due timers, and grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ID, CAP, WEIGHT, LABELS, ON, OFF = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local RPM, TPM, UNTIL_MS = ARGV[7], ARGV[8], ARGV[9]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local EXPIRIES = 16
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local known = call('HMGET', STATE, '#pool', ID)
local refused = opened(known[1])
if refused then return refused end
if not known[2] then return {NOTHING} end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
if pool.first_corrupt({ID}) then return corrupt(ID) end
if LABELS ~= '-' and LABELS ~= '' then check_types(LABELS) end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
pool.expire(EXPIRIES)
local r = pool.read(ID)
if not r or r.flags.removed then
  pool.reschedule()
  return {NOTHING}
end
if CAP ~= '-' then
  r.cap = tonumber(CAP)
  pool.set(r, 'adaptive', false)  -- a capacity set by hand resets the adaptive limit
end
if RPM ~= '-' then pool.extra(r).rpm = RPM end
if TPM ~= '-' then pool.extra(r).tpm = TPM end
if r.extra then
  pool.set(r, 'metered', r.extra.rpm ~= '0' or r.extra.tpm ~= '0')
  pool.limit_rate(r)
end
local on, off = pool.flags_of(ON), pool.flags_of(OFF)
-- When a caller marks an instance healthy, `off` contains the flag `unhealthy` and the flags that outcomes, checks and
-- heartbeats set. The event `healthy` is added only if the instance had one of these flags.
local is_cleared = false
for flag in pairs(off) do
  is_cleared = is_cleared or (flag ~= 'draining' and flag ~= 'warming' and r.flags[flag])
end
if on.draining and not r.flags.draining then pool.add_event('draining', ID) end
if off.draining and r.flags.draining then pool.add_event('undrained', ID) end
if on.unhealthy and not r.flags.unhealthy then pool.add_event('unhealthy', ID) end
if off.unhealthy and is_cleared then pool.add_event('healthy', ID) end
if off.ejected or off.half_open then
  r.streak = 0
  if r.extra then r.extra.checks = 0 end
  call('ZREM', DUE, 'E:' .. ID, 'V:' .. ID)
end
if off.resting then pool.rest(r, 0) end
if WEIGHT ~= '-' then r.weight = WEIGHT end
if LABELS ~= '-' then pool.relabel(r, LABELS == '' and '-' or LABELS) end
for flag in pairs(on) do pool.set(r, flag, true) end
for flag in pairs(off) do pool.set(r, flag, false) end
pool.store(r)
pool.dispatch()
pool.reschedule()
return {DONE, r.load}
