-- invalidate_tags: invalidate every entry that has one of the tags and was written before this call.
-- KEYS
--   meta       HASH    <tag>:meta
--   epochs     STRING  <tag>:epochs  "<cleared> <tagged> <merged>", three versions. An entry is invalid if its version
--                      is at most <cleared>. An entry that has a tag is also invalid if its version is at most
--                      <merged>. If the version of an entry is above <tagged>, its tags cannot make it invalid
--   tags       ZSET    <tag>:tags  for each tag, the version of its last invalidation
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   bus        text    channel of invalidations
--   origin     text    id of the invalidating process; messages on the bus contain it
--   max_marks  int     max number of tags whose last invalidation is kept. Beyond this limit, the oldest invalidations
--                      are deleted, and <merged> is raised to the newest deleted version
--   tags...    text    percent-encoded
-- RETURNS
--   {1, version}        the version of this invalidation
--   {0}                 the entries are being moved to another layout; nothing done
-- REPEAT  a second or late delivery invalidates again, which only causes misses; a miss is never wrong
-- ERRORS  CORRUPT if meta or epochs was not written by this library
-- COST    O(tags log T) for T tags whose last invalidation is kept
--@include corrupt
--@include whole_number
local META, EPOCHS, TAGS = KEYS[1], KEYS[2], KEYS[3]
local BUS, ORIGIN, MAX_MARKS, FIRST_TAG = ARGV[1], ARGV[2], tonumber(ARGV[3]), 4

local call = redis.call
local stored = call('HMGET', META, 'clock', 'frozen')
if stored[2] then return {0} end
local clock = whole_number(stored[1], 0)
if not clock then return corrupt(META, 'a clock that is no whole number') end
local cleared, tagged, merged = string.match(call('GET', EPOCHS) or '0 0 0', '^(%d+) (%d+) (%d+)$')
if not whole_number(cleared) or not whole_number(tagged) or not whole_number(merged) then
  return corrupt(EPOCHS, 'no three versions')
end
call('ZCARD', TAGS)
local time = call('TIME')
clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
local version = string.format('%d', clock)
for i = FIRST_TAG, #ARGV do
  call('ZREM', TAGS, ARGV[i])            -- a full server allows ZREM, and then all other writes of this script
  call('ZADD', TAGS, version, ARGV[i])
end
local over = call('ZCARD', TAGS) - MAX_MARKS
if over > 0 then
  local gone = call('ZPOPMIN', TAGS, over)
  local popped = tonumber(gone[#gone])
  if popped < 0 or popped > clock then popped = clock end                  -- another program has changed this score
  merged = string.format('%d', math.max(popped, tonumber(merged)))
end
call('SET', EPOCHS, cleared .. ' ' .. version .. ' ' .. merged)
call('HSET', META, 'clock', version)
for i = FIRST_TAG, #ARGV do call('SPUBLISH', BUS, 't ' .. version .. ' ' .. ORIGIN .. ' ' .. ARGV[i]) end
return {1, clock}
