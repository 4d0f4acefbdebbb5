-- report_checks: record results of active checks. An instance becomes unhealthy after unhealthy_threshold failed checks
-- in a row, and healthy again after healthy_threshold passed checks in a row.
-- KEYS
--   state       HASH  agentperf:{lb:<type>}:state
--   ready       ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due         ZSET  agentperf:{lb:<type>}:due
--   waitq       ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   claimed_ms  int   server time when the checks were claimed, ms: now_ms in the reply of claim_checks
--   until_ms    int   server time after which this request is refused, ms; 0: never
--   results...  text  '+' (passed) or '-' (failed), followed by the id of an instance; at most 500
-- RETURNS
--   {1, id...}   the instances that are not registered. The results of all others were recorded or ignored (see REPEAT)
--   {-3, fact}  {-4, field}   as in records.lua
--   {-6, now_ms}   the request came after until_ms; nothing was changed
-- REPEAT  harmless. A result is ignored if it was recorded before. It is also ignored if the instance already has the
--         result of a check that was claimed later
-- ERRORS  none
-- COST    O(k log N) for k results and N instances. It also grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local CLAIMED_MS, UNTIL_MS = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local fact = call('HGET', STATE, '#pool')
local refused = opened(fact)
if refused then return refused end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
local reply, ids = {DONE}, {}
for i = 3, #ARGV do ids[i - 2] = string.sub(ARGV[i], 2) end
local corrupt_id = pool.first_corrupt(ids)
if corrupt_id then return corrupt(corrupt_id) end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
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
