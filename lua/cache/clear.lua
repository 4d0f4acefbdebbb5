-- clear: make every entry a miss at once. Later calls of other scripts, such as put and sweep, free the values
-- (deferred deletion).
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
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}; <tag>:deferred:<version> is written too.
-- ARGV
--   bus       text    channel of invalidations
--   origin    text    id of the clearing process; messages on the bus contain it
-- RETURNS
--   {1, cleared, version}  cleared is the number of entries before the call
--   {0}                    the entries are being moved to another layout; nothing done
-- REPEAT  a second or late delivery clears again, which only causes misses; a miss is never wrong
-- ERRORS  CORRUPT if meta was not written by this library; nothing was written
-- COST    O(1): one RENAME and one UNLINK; the server frees the memory of the unlinked keys in the background
--@include corrupt
--@include whole_number
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, EPOCHS, TAGS = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local BUS, ORIGIN = ARGV[1], ARGV[2]

local call = redis.call
local stored = call('HMGET', META, 'clock', 'frozen')
if stored[2] then return {0} end
local clock = whole_number(stored[1], 0)
if not clock then return corrupt(META, 'a clock that is no whole number') end
local cleared = call('HLEN', SIZE)
local deferred_count = call('LLEN', DEFERRED)
for _, key in ipairs({NEW, HOT, WARM, COLD, GHOST, TAGS}) do call('ZCARD', key) end  -- fails if the type is wrong
call('GET', EPOCHS)
local time = call('TIME')
clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
local version = string.format('%d', clock)
call('UNLINK', NEW, HOT, WARM, COLD, GHOST, TAGS)
if cleared > 0 then
  call('RENAME', SIZE, DEFERRED .. ':' .. version)
  call('RPUSH', DEFERRED, version)
  deferred_count = deferred_count + 1
end
call('SET', EPOCHS, version .. ' ' .. version .. ' ' .. version)
call('HSET', META, 'clock', version, 'bytes', 0, 'removed', version, 'accesses', 0, 'grow', 0, 'halvings', '0 0 0 0',
  'climb', '0 0 -3 0 0', 'next', '', 'scan', '0', 'deferred', deferred_count)
call('SPUBLISH', BUS, 'c ' .. version .. ' ' .. ORIGIN .. ' ')
return {1, cleared, clock}
