-- configure: give a pool other settings, and have a page of its instances follow them.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
-- ARGV
--   settings  text  as pool.lua has them
--   first     int   rank of the first instance of the page
--   count     int   instances per page
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, next_rank, before}   next_rank: 0 after the last page; before: the settings it had, empty for none
--   {-3, fact}  {-4, field}  other schema; a field we did not write
--   {-6, now_ms}             too late; nothing done
-- REPEAT  the same state; after until_ms nothing, so that no late copy undoes what was done since
-- ERRORS  none
-- COST    O(count log N), and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ, IDS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local SETTINGS, FIRST, COUNT, UNTIL_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
--@include pool
--@include health
--@include maintenance

local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if UNTIL_MS ~= '0' and now_us / 1000 > tonumber(UNTIL_MS) then return {TOO_LATE, floor(now_us / 1000)} end
local known = call('HMGET', STATE, '#pool', '#settings')
local strategy = match(known[1] or '', POOL)
if known[1] and not strategy then return {OTHER_SCHEMA, known[1]} end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local first, count = tonumber(FIRST), tonumber(COUNT)
local page, registered = call('ZRANGE', IDS, first, first + count - 1), call('ZCARD', IDS)
local all = upkeep(now_us)
call('HSET', STATE, '#settings', SETTINGS)
if strategy then call('HSET', STATE, '#pool', all.pool_fact(strategy, SETTINGS)) end
all = upkeep(now_us)
for _, id in ipairs(page) do
  local r = all.read(id)
  if r and r.flags ~= '-' then
    if not all.settings().adaptive then all.set(r, 'a', false) end
    all.park(r)
    all.store(r)
  end
end
if first == 0 and all.weigh() then all.resettle('0') end
all.pump()
all.retime()
return {DONE, first + count < registered and first + count or 0, known[2] or ''}
