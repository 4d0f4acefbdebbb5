-- fence: close a shard of the old layout; relayout.lua explains layouts. From now on, only the scripts that empty the
-- shard use its entries: thin.lua, export.lua and forget.lua. Other scripts refuse to use the entries, or find them
-- invalid. A process that reads an entry without a script also reads epochs. The new values of epochs make every entry
-- invalid. meta keeps the earlier epochs, for export.lua.
-- KEYS
--   meta    HASH    <tag>:meta
--   size    HASH    <tag>:size
--   epochs  STRING  <tag>:epochs
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   bus     text    channel of invalidations
--   origin  text    id of the process that closes the shard; the message on the bus contains it
-- RETURNS
--   {1, clock, entries, bytes, evicted, expired, hot, warm, cold, misses, saved_ms, corrupt}
--           the shard is closed, by this call or an earlier one; the reply has its clock, its size and its counters
-- REPEAT  a second or late delivery finds the shard closed
-- ERRORS  CORRUPT if meta or epochs was not written by this library; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
local META, SIZE, EPOCHS = KEYS[1], KEYS[2], KEYS[3]
local BUS, ORIGIN = ARGV[1], ARGV[2]
local CLOSED = '8999999999999999'        -- above every version: no entry is valid; see entry_format.py

local call = redis.call
local m = call('HMGET', META, 'settings', 'frozen', 'clock', 'bytes', 'evicted', 'expired', 'hot', 'warm', 'cold',
  'misses', 'saved_ms', 'corrupt')
local clock, bytes = whole_number(m[3], 0), whole_number(m[4], 0)
if not clock or not bytes then return corrupt(META, 'clock or bytes that is no whole number') end
local entries = call('HLEN', SIZE)
if not m[2] then
  local epochs = call('GET', EPOCHS) or '0 0 0'
  local cleared, tagged, merged = string.match(epochs, '^(%d+) (%d+) (%d+)$')
  if not whole_number(cleared) or not whole_number(tagged) or not whole_number(merged) then
    return corrupt(EPOCHS, 'no three versions')
  end
  local time, text = call('TIME'), m[1] or 'none'
  clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock) + 1
  -- If this meta is also the meta of the whole cache, its settings already show the change of layout. In this case,
  -- "closed" is not appended to the settings.
  if not string.match(text, '%d to %d+$') and not string.match(text, '%d layout %d+') then text = text .. ' closed' end
  call('HSET', META, 'settings', text, 'frozen', epochs, 'clock', string.format('%d', clock))
  call('SET', EPOCHS, CLOSED .. ' ' .. CLOSED .. ' ' .. CLOSED)
  call('SPUBLISH', BUS, 'c ' .. string.format('%d', clock) .. ' ' .. ORIGIN .. ' ')
end
local reply = {1, clock, entries, bytes}
for i = 5, 12 do reply[i] = whole_number(m[i], 0) or 0 end
return reply
