-- clear: make every entry a miss at once. The values are freed later, by put and sweep.
-- KEYS
--   meta        HASH    <tag>:meta
--   size        HASH    <tag>:size
--   exp         ZSET    <tag>:exp
--   new         ZSET    <tag>:new
--   hot         ZSET    <tag>:hot
--   warm        ZSET    <tag>:warm
--   cold        ZSET    <tag>:cold
--   ghost       ZSET    <tag>:ghost
--   trash       LIST    <tag>:trash
--   gen         STRING  <tag>:gen
--   tags        ZSET    <tag>:tags
-- ARGV
--   bus         text    channel of invalidations
--   origin      text    who clears, for its own ears
-- RETURNS
--   {1, forgotten, version}
-- REPEAT   a second or late delivery clears again: a miss is never wrong
-- ERRORS   none
-- COST     O(1): a rename, and unlinks that the server frees in the background
local META, SIZE, EXP, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GHOST, TRASH, GEN, TAGS = KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local BUS, ORIGIN = ARGV[1], ARGV[2]

local call = redis.call
local clock = tonumber(call('HGET', META, 'clock') or 0) or 0
local forgotten = call('HLEN', SIZE)
local heaps = call('LLEN', TRASH)
for _, key in ipairs({EXP, NEW, HOT, WARM, COLD, GHOST, TAGS}) do call('ZCARD', key) end         -- each a ZSET
call('GET', GEN)
local time = call('TIME')
clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
local version = string.format('%d', clock)
call('UNLINK', EXP, NEW, HOT, WARM, COLD, GHOST, TAGS)
if forgotten > 0 then
  call('RENAME', SIZE, TRASH .. ':' .. version)
  call('RPUSH', TRASH, version)
  heaps = heaps + 1
end
call('SET', GEN, version .. ' ' .. version .. ' ' .. version)
call('HSET', META, 'clock', version, 'bytes', 0, 'removed', version, 'accesses', 0, 'grow', 0, 'halvings', '0 0 0 0',
  'next', '', 'trash', heaps)
call('SPUBLISH', BUS, 'c ' .. version .. ' ' .. ORIGIN .. ' ')
return {1, forgotten, clock}
