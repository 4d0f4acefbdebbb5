-- drop: delete the settings, counters, indexes and history of a cache that was cleared and swept.
-- KEYS
--   meta      HASH    <tag>:meta
--   size      HASH    <tag>:size
--   new       ZSET    <tag>:new
--   hot       ZSET    <tag>:hot
--   warm      ZSET    <tag>:warm
--   cold      ZSET    <tag>:cold
--   ghost     ZSET    <tag>:ghost
--   deferred  LIST    <tag>:deferred
--   epochs    STRING  <tag>:epochs
--   tags      ZSET    <tag>:tags
--   resent    ZSET    <tag>:resent
--   history   HASH    <tag>:history
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   keep_ms   int     TTL of epochs, ms. During this time, a value whose computation began before the clear is not
--                     stored. If the settings contain a layout number, meta also keeps this number for keep_ms
-- RETURNS
--   {1}     dropped
--   {0, n}  the cache is in use; nothing was deleted. n is the sum of three numbers: entries, clears whose values are
--           not freed yet, and repeated or cancelled requests of which copies may still arrive
-- REPEAT  if the cache has no entry, a second delivery also deletes settings that were written after the first
--         delivery. The next call of a program that uses the cache writes these settings again
-- ERRORS  a key of the wrong type is refused; nothing was deleted
-- COST    O(1); the server frees the memory of the unlinked keys in the background
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, EPOCHS, TAGS, RESENT, HISTORY = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local KEEP_MS = ARGV[1]

local call = redis.call
local time = call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for _, key in ipairs({META, HISTORY}) do call('HLEN', key) end  -- fails if the type is wrong
for _, key in ipairs({NEW, HOT, WARM, COLD, GHOST, TAGS}) do call('ZCARD', key) end
call('GET', EPOCHS)
local left = call('HLEN', SIZE) + call('LLEN', DEFERRED) + call('ZCOUNT', RESENT, string.format('%.0f', now_ms), '+inf')
if left > 0 then return {0, left} end
local layout = string.match(call('HGET', META, 'settings') or '', ' layout (%d+)')
call('PEXPIRE', EPOCHS, KEEP_MS)
call('UNLINK', META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, TAGS, RESENT, HISTORY)
if layout then                           -- a new cache must not start at layout 0: processes may know the old number
  call('HSET', META, 'layout', layout)
  call('PEXPIRE', META, KEEP_MS)
end
return {1}
