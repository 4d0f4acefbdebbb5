-- select: return the instance that acquire would pick now, without leasing it.
-- KEYS
--   state   HASH  agentperf:{lb:<type>}:state
--   ready   ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due     ZSET  agentperf:{lb:<type>}:due
--   waitq   ZSET  agentperf:{lb:<type>}:waitq
--   ids     ZSET  agentperf:{lb:<type>}:ids
--   ring    ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   wanted  text  strategy the pool must have, or '-' for any
--   labels  text  comma-separated labels; the instance must have all of them; '-' for none
--   point   int   position on the ring, 0 to 2^48 - 1: a hash of the caller's affinity, or random without an affinity
--   random  int   random number, 0 to 2^52 - 1
-- RETURNS
--   {1, id, record}   the instance that would be picked
--   {0}               no suitable instance has free capacity, or there is no such pool
--   {-2, strategy}    the pool has another strategy
--   {-3, fact}  {-4, field}  {-7, strategy}   as in records.lua
-- REPEAT  harmless: it only processes due timers and grants units to waiters
-- ERRORS  none
-- COST    O(log N) for N instances; with several labels, O(N) at worst. It processes at most 64 due timers, and grants
--         units to at most 16 waiters
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local WANTED, LABELS, POINT, RANDOM = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance
--@include pick

local EXPIRIES = 64
local facts = call('HMGET', STATE, '#pool', '#load', '#cap')
if WANTED ~= '-' and not rules(POOL .. WANTED) then return {UNKNOWN_STRATEGY, WANTED} end
if not facts[1] then return {NOTHING} end
local refused, strategy, _, how = opened(facts[1])
if refused then return refused end
if WANTED ~= strategy and WANTED ~= '-' and call('ZCARD', IDS) > 0 then return {OTHER_STRATEGY, strategy} end
call('ZCARD', RING)
if LABELS ~= '-' then check_types(LABELS) end

local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
pool.maintain(EXPIRIES)
local id
local several = string.find(LABELS, ',', 1, true)
if not several or how == 'ring' then
  local from = (LABELS == '-' or several) and READY or READY .. '@' .. LABELS
  local suits = several and function(record) return has_all(field(record, 'labels') or '', LABELS) end
  id = pick(how, from, RANDOM, POINT, pool.now_ms, facts[2], facts[3], suits)
end
if several and not id then id = pool.best(LABELS) end
if not id then return {NOTHING} end
local record = call('HGET', STATE, id)
if read_record(record or '') then return {DONE, id, record} end
-- The reply {-4} means that nothing was changed. If this call has changed something, it returns {0}, and a later call
-- reports the corrupt record.
return pool.changed and {NOTHING} or corrupt(id)
