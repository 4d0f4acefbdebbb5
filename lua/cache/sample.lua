-- sample: add the figures of a cache to its history. In each slice of ten seconds, only the first call adds them.
-- KEYS
--   meta     HASH  <tag>:meta
--   size     HASH  <tag>:size
--   history  HASH  <tag>:history
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   none
-- RETURNS
--   {1, wait_ms}  sampled now; the next slice begins in wait_ms
--   {0, wait_ms}  an earlier call sampled this slice; the next slice begins in wait_ms
--   {0, 0}        the cache has no settings; nothing done
-- REPEAT  a second delivery finds that the slice was sampled before
-- ERRORS  CORRUPT <key>: the key has a wrong type or a value that this library did not write; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
--@include history
local META, SIZE, HISTORY = KEYS[1], KEYS[2], KEYS[3]

local call = redis.call
local clock = call('TIME')
local history, wait_ms, refusal = open_history(HISTORY, clock[1] * 1000 + math.floor(clock[2] / 1000))
if refusal then return refusal end
if not history then return {0, wait_ms} end
local stored = redis.pcall('HMGET', META, 'settings', 'hot', 'warm', 'cold', 'misses', 'evicted', 'bytes')
if stored.err then return corrupt(META, 'something else (' .. stored.err .. ')') end
if not stored[1] then return {0, 0} end
local size = redis.pcall('HLEN', SIZE)
if type(size) == 'table' then return corrupt(SIZE, 'something else (' .. size.err .. ')') end
local counters = {}
for i = 2, 7 do
  counters[i] = whole_number(stored[i], 0)
  if not counters[i] then return corrupt(META, 'a counter that is no number') end
end
save_history(history, {
  {'hits', 'count', counters[2] + counters[3] + counters[4]}, {'misses', 'count', counters[5]},
  {'evictions', 'count', counters[6]}, {'size', 'last', size}, {'bytes', 'last', counters[7]},
})
return {1, history.next_ms}
