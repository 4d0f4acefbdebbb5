-- expect: mark keys before their entries are read from the old layout; relayout.lua explains layouts. Every write and
-- every removal of a key in the new layout deletes the mark of the key. adopt.lua stores an entry only if its key still
-- has the mark.
-- KEYS
--   meta      HASH  <tag>:meta
--   marks     HASH  <tag>:marks  key -> the clock when it was marked
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   max       int   max marks of the shard. If the present marks and the names of this call together exceed max, all
--                   present marks are deleted first. The caller must mark the keys of the deleted marks again, and
--                   then read the entries of these keys again
--   keep_ms   int   TTL of all marks, ms; each call renews it
--   names...  text  the stored names, at most 256
-- RETURNS
--   {1, mark, ...}  one mark for each name. A key that is already marked keeps its mark
--   {0}             no entries are being moved to this shard; nothing done
-- REPEAT  a second or late delivery may leave marks that adopt.lua never uses; these marks expire
-- ERRORS  CORRUPT if the clock in meta is not a number; nothing was written
-- COST    O(names)
--@include corrupt
--@include whole_number
local META, MARKS = KEYS[1], KEYS[2]
local MAX, KEEP_MS, NAMES = tonumber(ARGV[1]), ARGV[2], 3

local call = redis.call
local m = call('HMGET', META, 'clock', 'moving')
local clock = whole_number(m[1], 0)
if not clock then return corrupt(META, 'a clock that is no whole number') end
if not string.match(m[2] or '', '^%d+ %d+$') then return {0} end
local names = {unpack(ARGV, NAMES)}
local held = call('HMGET', MARKS, unpack(names))
if call('HLEN', MARKS) + #names > MAX then
  call('UNLINK', MARKS)
  held = {}
end
local time = call('TIME')
clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
local mark, reply, new = string.format('%d', clock), {1}, {}
for i, name in ipairs(names) do
  local present = whole_number(held[i] or nil)
  if not present then new[#new + 1] = name; new[#new + 1] = mark end
  reply[i + 1] = present or clock
end
if #new > 0 then
  call('HSET', MARKS, unpack(new))
  call('HSET', META, 'clock', mark)
end
call('PEXPIRE', MARKS, KEEP_MS)
return reply
