-- watch: return whether a shard has a free instance. If not, watch the shard: the next script that finds a free
-- instance publishes a wake-up. Waiters of other shards call this script, so that free capacity of one shard does not
-- stay idle while they wait.
-- KEYS
--   state    HASH  agentperf:{lb:<type>}:state
--   ready    ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due      ZSET  agentperf:{lb:<type>}:due
--   waitq    ZSET  agentperf:{lb:<type>}:waitq; the message 'free' is published on the channel with the same name
-- ARGV
--   labels   text  comma-separated labels; the instance must have all of them; '-' for none
--   live_ms  int   time for which the shard is watched, ms; 0: it is not watched
-- RETURNS
--   1   an instance with these labels is free now
--   0   no such instance is free, or the free instances may still go to waiters of this shard. If the pool exists and
--     live_ms is not 0, the shard is watched from now on
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  the watch lasts live_ms from the last copy
-- ERRORS  none
-- COST    O(log N) for N instances; with several labels, O(N) at worst. It calls some 20 commands, processes at most 64
--         due timers, and grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local LABELS, LIVE_MS = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local EXPIRIES = 64
local fact = call('HGET', STATE, '#pool')
if not fact then return NOTHING end
local refused = opened(fact)
if refused then return refused end
if LABELS ~= '-' then check_types(LABELS) end
local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
local _, dispatched = pool.maintain(EXPIRIES)
if dispatched and pool.best(LABELS) then return DONE end
if LIVE_MS ~= '0' then
  pool.watch(pool.now_ms + LIVE_MS)
  pool.reschedule()
end
return NOTHING
