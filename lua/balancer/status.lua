-- status: process due timers, then return one page of a pool's instances in the order of their registration. For a user
-- without the right to write, the script only reads.
-- KEYS
--   state  HASH  agentperf:{lb:<type>}:state
--   ready  ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due    ZSET  agentperf:{lb:<type>}:due
--   waitq  ZSET  agentperf:{lb:<type>}:waitq
--   ids    ZSET  agentperf:{lb:<type>}:ids
-- ARGV
--   first  int   rank of the first instance of the page
--   count  int   instances per page
-- RETURNS
--   {1, strategy, registered, waiting, late, picks, next_rank, now_ms, panic_ms, settings, id, record, extra, id ...}
--     registered: number of instances. waiting: number of waiters. late: on the first page, number of leases and grants
--     that have expired but were not processed yet; 0 on the other pages. picks: number of leases granted so far.
--     next_rank: rank of the first instance of the next page, 0 after the last page. panic_ms: start of the panic, 0
--     for none. settings: value of #settings. id, record, extra: an instance, its record, and its extra record (empty
--     for most instances)
--   {0}   no such pool
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: it only processes due timers and grants units to waiters
-- ERRORS  none
-- COST    O(log N + count) for N instances. It processes at most 64 due timers, and grants units to at most 16 waiters.
--         On the first page, it then reads up to 5000 due timers
local STATE, READY, DUE, WAITQ, IDS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST, COUNT = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance
--@include overdue

local first, count = tonumber(FIRST), tonumber(COUNT)
local fact = call('HGET', STATE, '#pool')
local registered = call('ZCARD', IDS)
if not fact then return {NOTHING} end
local refused = opened(fact)
if refused then return refused end
local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
local page = call('ZRANGE', IDS, first, first + count - 1)
-- Split the page into parts of at most 1000 instances. For each part, call `take` with the ids, records and extra
-- records.
local function for_each_part(take)
  for from = 1, #page, 1000 do
    local ids, extras = {unpack(page, from, math.min(#page, from + 999))}, {}
    for i, id in ipairs(ids) do extras[i] = '+' .. id end
    take(ids, call('HMGET', STATE, unpack(ids)), call('HMGET', STATE, unpack(extras)))
  end
end
local invalid_id
for_each_part(function(ids, found, extras)
  for i, id in ipairs(ids) do
    if not found[i] or not pool.is_valid(found[i], extras[i]) then invalid_id = id end
  end
end)
if invalid_id then return corrupt(invalid_id) end
-- The simulated server of the unit tests has no redis.acl_check_cmd.
if not redis.acl_check_cmd or redis.acl_check_cmd('ZREM', DUE, '') then
  call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
  pool.maintain(EXPIRIES)
end
local late = first == 0 and count_overdue(pool.now_ms) or 0
local facts = call('HMGET', STATE, '#picks', '#panic', '#settings')
page = call('ZRANGE', IDS, first, first + count - 1)
local next_rank = first + #page < registered and #page > 0 and first + #page or 0
local reply = {
  DONE, pool.strategy, registered, call('ZCARD', WAITQ), late, whole_number(facts[1]) or 0, next_rank, pool.now_ms,
  whole_number(facts[2]) or 0, facts[3] or '',
}
for_each_part(function(ids, found, extras)
  for i, id in ipairs(ids) do
    reply[#reply + 1] = id
    reply[#reply + 1] = found[i] or ''
    reply[#reply + 1] = extras[i] or ''
  end
end)
return reply
