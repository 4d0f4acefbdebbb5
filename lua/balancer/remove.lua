-- remove: remove an instance. It gets no new leases, and its record is deleted when its last lease ends.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   id        text  the instance
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, empty}   removed. empty: 1 if the pool now has no instances, no leases and no waiters, else 0
--   {0}   no such instance
--   {-3, fact}  {-4, field}   as in records.lua
--   {-6, now_ms}   the request came after until_ms; nothing was changed
-- REPEAT  a second copy of the request returns {0} and changes nothing, unless the instance was registered again before
--         the copy arrived. In that case, the copy removes the instance again. After until_ms, every copy is refused
-- ERRORS  none
-- COST    O(log N + log R) for N instances and a ring of R points
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local ID, UNTIL_MS = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local POINTS = 32
local CHECKS = string.sub(READY, 1, -6) .. 'checks'
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local fact = call('HGET', STATE, '#pool')
call('ZCARD', RING)
call('ZCARD', CHECKS)
local refused = opened(fact)
if refused then return refused end
if not call('ZSCORE', IDS, ID) then return {NOTHING} end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
local r, is_corrupt = pool.read(ID)
if is_corrupt then return corrupt(ID) end
call('ZREM', IDS, ID)
call('ZREM', CHECKS, ID)
call('ZREM', DUE, 'H:' .. ID, 'E:' .. ID, 'R:' .. ID, 'V:' .. ID, 'C:' .. ID)
for n = 1, POINTS do call('ZREM', RING, ID .. '#' .. n) end
if r then
  -- The record stays until the last lease ends. If the instance is registered again before then, it must not be
  -- resting.
  pool.rest(r, 0)
  r.flags = {removed = true}
  pool.store(r)
end
pool.add_event('removed', ID)
pool.reschedule()
local load = tonumber(call('HGET', STATE, '#load') or 0)
local is_empty = call('ZCARD', IDS) == 0 and call('ZCARD', WAITQ) == 0 and load <= 0
return {DONE, is_empty and 1 or 0}
