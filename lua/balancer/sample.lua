-- sample: add the figures of a pool to its history. In each slice of ten seconds, only the first call adds them.
-- KEYS
--   state    HASH  agentperf:{lb:<type>}:state
--   waitq    ZSET  agentperf:{lb:<type>}:waitq
--   history  HASH  agentperf:{lb:<type>}:history
-- ARGV
--   none
-- RETURNS
--   {1, wait_ms}  sampled now; the next slice begins in wait_ms
--   {0, wait_ms}  sampled before in this slice; or there is no such pool, or it has no instance, and wait_ms is 0
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  finds that the slice was sampled before
-- ERRORS  CORRUPT <key>: the history holds another type, or a value that this library did not write; nothing was
--         written
-- COST    O(1)
--@include strategies
--@include whole_number
--@include records
--@include history
local STATE, WAITQ, HISTORY = KEYS[1], KEYS[2], KEYS[3]

local facts = call('HMGET', STATE, '#pool', '#load', '#unhealthy', '#expires')
if not facts[1] or facts[4] then return {NOTHING, 0} end
local refused = opened(facts[1])
if refused then return refused end
local load, unhealthy = whole_number(facts[2], 0), whole_number(facts[3], 0)
if not load then return corrupt('#load') end
if not unhealthy then return corrupt('#unhealthy') end
local waiters = call('ZCARD', WAITQ)
local clock = call('TIME')
local history, wait_ms, refusal = open_history(HISTORY, clock[1] * 1000 + floor(clock[2] / 1000))
if refusal then return refusal end
if not history then return {NOTHING, wait_ms} end
save_history(history, {{'load', 'sum', load}, {'waiters', 'max', waiters}, {'unhealthy', 'max', unhealthy}})
return {DONE, history.next_ms}
