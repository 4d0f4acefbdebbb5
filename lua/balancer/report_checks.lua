-- report_checks: record results of active checks. So many failed ones in a row disable an instance, so many passed ones
-- enable it.
-- KEYS
--   state       HASH  agentperf:{lb:<type>}:state
--   ready       ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due         ZSET  agentperf:{lb:<type>}:due
--   waitq       ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   claimed_ms  int   when they were claimed, as claim_checks replied
--   until_ms    int   server time after which this request is refused, ms; 0: never
--   results...  text  + or - and an instance that passed or failed, at most 500
-- RETURNS
--   {1, id...}   done, but for these: not registered
--   {-3, fact}  {-4, field}   as in pool.lua
--   {-6, now_ms}   too late; nothing done
-- REPEAT  harmless: a result counts once, and not when a later one was recorded
-- ERRORS  none
-- COST    O(k log N), and grants to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local CLAIMED_MS, UNTIL_MS = ARGV[1], ARGV[2]
--@include strategies
--@include records
--@include pool
--@include whole_records
--@include health
--@include maintenance

local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local fact = call('HGET', STATE, '#pool')
local refused = opened(fact)
if refused then return refused end
local invalid = invalid_counter()
if invalid then return corrupt(invalid) end
local pool = maintenance(now_us)
local reply, ids = {DONE}, {}
for i = 3, #ARGV do ids[i - 2] = string.sub(ARGV[i], 2) end
local corrupt_id = pool.first_corrupt(ids)
if corrupt_id then return corrupt(corrupt_id) end
call('ZREM', DUE, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
for i, id in ipairs(ids) do
  local r = pool.read(id)
  if not r or r.flags.removed then
    reply[#reply + 1] = id
  else
    pool.record_check(r, string.sub(ARGV[i + 2], 1, 1) == '+', tonumber(CLAIMED_MS))
    pool.store(r)
  end
end
pool.dispatch()
pool.reschedule()
return reply
