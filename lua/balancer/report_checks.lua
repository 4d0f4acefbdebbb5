-- report_checks: say how active checks went. So many failed in a row take an instance out, so many passed bring it back.
-- KEYS
--   state        HASH  agentperf:{lb:<type>}:state
--   ready        ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due          ZSET  agentperf:{lb:<type>}:due
--   waitq        ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   claimed_ms   int   when they were taken on, as claim_checks said
--   until_ms     int   server time after which this request is refused, ms; 0: never
--   results...   text  + or - and an instance that passed or failed, at most 500
-- RETURNS
--   {1, id...}   done, but for these: not registered
--   {-3, fact}  {-4, field}   other schema; a field we did not write
--   {-6, now_ms}   too late; nothing done
-- REPEAT  harmless: a result counts once, and none that was taken on before another that is known
-- ERRORS  none
-- COST    O(k log N), and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local CLAIMED_MS, UNTIL_MS = ARGV[1], ARGV[2]
--@include pool
--@include health
--@include maintenance

local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local pool = call('HGET', STATE, '#pool')
if pool and not match(pool, POOL) then return {OTHER_SCHEMA, pool} end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep(now_us)
local reply = {DONE}
call('ZREM', DUE, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
for i = 3, #ARGV do
  local id = string.sub(ARGV[i], 2)
  local r = all.read(id)
  if not r or all.has(r, 'r') then
    reply[#reply + 1] = id
  else
    all.checked(r, string.sub(ARGV[i], 1, 1) == '+', tonumber(CLAIMED_MS))
    all.store(r)
  end
end
all.pump()
all.retime()
return reply
