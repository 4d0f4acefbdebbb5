-- cool_down: let an instance rest. It gets no work until the rest ends. The call never shortens a rest that has begun.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   id        text  the instance
--   rest_ms   int   length of the rest, ms
--   why       text  the reason, as in health.lua: 'rate_limited' or 'cooled_down'
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   1   the instance rests
--   0   no such instance
--   {-3, fact}  {-4, field}   as in records.lua
--   {-6, now_ms}   the request came after until_ms; nothing was changed
-- REPEAT  the rest lasts at least rest_ms from the last copy of the request; a copy that arrives after until_ms is
--         refused
-- ERRORS  none
-- COST    O(log N) for N instances
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ID, REST_MS, WHY, UNTIL_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
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
local known = call('HMGET', STATE, '#pool', ID)
local refused = opened(known[1])
if refused then return refused end
if not known[2] then return NOTHING end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
if pool.first_corrupt({ID}) then return corrupt(ID) end
local r = pool.read(ID)
if not r or r.flags.removed then return NOTHING end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
pool.rest(r, tonumber(REST_MS), WHY)
pool.store(r)
pool.reschedule()
return DONE
