-- update: change facts of an instance: capacity, weight, labels, health, draining.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   id        text   the instance
--   cap       text   units, or - to leave it
--   weight    text   decimal, or - to leave it
--   labels    text   a,b; empty for none, or - to leave them
--   on        text   flags to set, letters of pool.lua
--   off       text   flags to clear
--   rpm       text   requests a minute, decimal, 0: any number, or - to leave it
--   tpm       text   tokens a minute likewise
--   until_ms  int    server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, load}   done; the units leased now
--   {0}         no such instance
--   {-3, fact}  {-4, field}   other schema; a field we did not write
--   {-6, now_ms}   too late; nothing done
-- REPEAT  the same state; after until_ms nothing, so that no late copy undoes what was done since
-- ERRORS  none
-- COST    O(log N), and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ID, CAP, WEIGHT, LABELS, ON, OFF = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local RPM, TPM, UNTIL_MS = ARGV[7], ARGV[8], ARGV[9]
--@include pool
--@include health
--@include maintenance

local EXPIRIES = 16
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local known = call('HMGET', STATE, '#pool', ID)
if known[1] and not match(known[1], POOL) then return {OTHER_SCHEMA, known[1]} end
if not known[2] then return {NOTHING} end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep(now_us)
if not all.read(ID) then return {CORRUPT, ID} end
if LABELS ~= '-' and LABELS ~= '' then check(LABELS) end
call('ZREM', DUE, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
all.reap(EXPIRIES)
local r = all.read(ID)
if not r or all.has(r, 'r') then
  all.retime()
  return {NOTHING}
end
if CAP ~= '-' then
  r.cap = tonumber(CAP)
  all.set(r, 'a', false)  -- who sets it by hand knows better than what was learnt
end
if RPM ~= '-' then all.more(r).rpm = RPM end
if TPM ~= '-' then all.more(r).tpm = TPM end
if r.more then
  all.set(r, 'l', r.more.rpm ~= '0' or r.more.tpm ~= '0')
  all.park(r)
end
-- What is marked healthy is so whatever was held against it, by others as well.
local events = {d = {'draining', 'undrained', 'd'}, u = {'unhealthy', 'healthy', '[usech]'}}
for flag, kinds in pairs(events) do
  if string.find(ON, flag, 1, true) and not all.has(r, flag) then all.tell(kinds[1], ID) end
  if string.find(OFF, flag, 1, true) and string.find(r.flags, kinds[3]) then all.tell(kinds[2], ID) end
end
if string.find(OFF, '[eh]') then
  r.fails = 0
  if r.more then r.more.checks = 0 end
  call('ZREM', DUE, 'E:' .. ID, 'V:' .. ID)
end
if WEIGHT ~= '-' then r.weight = WEIGHT end
if LABELS ~= '-' then all.relabel(r, LABELS == '' and '-' or LABELS) end
for flag in string.gmatch(ON, '%a') do all.set(r, flag, true) end
for flag in string.gmatch(OFF, '%a') do all.set(r, flag, false) end
all.store(r)
all.pump()
all.retime()
return {DONE, r.load}
