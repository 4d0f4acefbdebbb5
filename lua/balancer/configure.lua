-- configure: replace the settings of a pool, and apply the new settings to one page of its instances.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
-- ARGV
--   settings  text  new value of the field #settings of state, see pool.lua
--   first     int   rank of the first instance of the page
--   count     int   number of instances per page
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, next_rank, before}   next_rank: value of `first` for the next page, 0 after the last page. before: the
--     replaced settings, empty if there were none
--   {-3, fact}  {-4, field}   as in records.lua
--   {-6, now_ms}             the request came after until_ms; nothing was changed
-- REPEAT  results in the same state; a copy that arrives after until_ms is refused, since it could undo a later change
-- ERRORS  none
-- COST    O(count log N) for N instances. It also grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ, IDS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local SETTINGS, FIRST, COUNT, UNTIL_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
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
local known = call('HMGET', STATE, '#pool', '#settings')
local refused, strategy = opened(known[1])
if refused then return refused end
local first, count = tonumber(FIRST), tonumber(COUNT)
local page, registered = call('ZRANGE', IDS, first, first + count - 1), call('ZCARD', IDS)
local pool = maintenance(now_us)
if pool.invalid and pool.invalid ~= '#settings' then return corrupt(pool.invalid) end
local corrupt_id = pool.first_corrupt(page)
if corrupt_id then return corrupt(corrupt_id) end
call('HSET', STATE, '#settings', SETTINGS, '#configured', '1')
if strategy then call('HSET', STATE, '#pool', pool.pool_fact(strategy, SETTINGS)) end
pool = maintenance(now_us)
for _, id in ipairs(page) do
  local r = pool.read(id)
  if r and next(r.flags) then
    if pool.settings.adaptive == 0 then pool.set(r, 'adaptive', false) end
    pool.limit_rate(r)
    pool.store(r)
  end
end
if first == 0 and pool.update_panic() then pool.store_away('0') end
pool.dispatch()
pool.reschedule()
return {DONE, first + count < registered and first + count or 0, known[2] or ''}
