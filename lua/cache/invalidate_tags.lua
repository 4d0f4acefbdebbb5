-- invalidate_tags: every entry that carries one of the tags and is older than now becomes a miss.
-- KEYS
--   meta        HASH    <tag>:meta
--   gen         STRING  <tag>:gen  "<floor> <tagver> <tagfloor>"
--   tags        ZSET    <tag>:tags
-- ARGV
--   bus         text    channel of invalidations
--   origin      text    who invalidates, for its own ears
--   max_marks   int     marks to keep; beyond, the oldest merge into tagfloor, and tagged entries up to it are misses
--   tags...     text    the tags
-- RETURNS
--   {1, version}
-- REPEAT   a second or late delivery invalidates again: a miss is never wrong
-- ERRORS   CORRUPT gen is not ours
-- COST     O(tags log T)
local META, GEN, TAGS = KEYS[1], KEYS[2], KEYS[3]
local BUS, ORIGIN, MAX_MARKS, FIRST_TAG = ARGV[1], ARGV[2], tonumber(ARGV[3]), 4

local call = redis.call
local clock = tonumber(call('HGET', META, 'clock') or 0) or 0
local floor, _, tag_floor = string.match(call('GET', GEN) or '0 0 0', '^(%d+) (%d+) (%d+)$')
if not floor then return redis.error_reply('CORRUPT ' .. GEN .. ' no three versions') end
call('ZCARD', TAGS)
local time = call('TIME')
clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
local version = string.format('%d', clock)
for i = FIRST_TAG, #ARGV do
  call('ZREM', TAGS, ARGV[i])            -- what frees comes first: after it a full server lets the others pass
  call('ZADD', TAGS, version, ARGV[i])
end
local over = call('ZCARD', TAGS) - MAX_MARKS
if over > 0 then
  local gone = call('ZPOPMIN', TAGS, over)
  tag_floor = string.format('%d', math.max(tonumber(gone[#gone]), tonumber(tag_floor)))
end
call('SET', GEN, floor .. ' ' .. version .. ' ' .. tag_floor)
call('HSET', META, 'clock', version)
for i = FIRST_TAG, #ARGV do call('SPUBLISH', BUS, 't ' .. version .. ' ' .. ORIGIN .. ' ' .. ARGV[i]) end
return {1, clock}
