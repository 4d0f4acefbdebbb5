-- relayout: take the next step from one layout of a cache to another. A layout divides the cache into a number of
-- shards. Layouts are numbered, and each change of layout raises the number. The names of keys contain this number, so
-- no two layouts of a cache share keys.
-- KEYS
--   meta    HASH  <tag>:meta of the cache
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   step    text  'begin': from now on, programs wait for 'switch'; 'switch': the new layout applies, while the old one
--                 still holds entries; 'settle': the old layout is empty
--   shards  int   number of shards of the new layout
--   layout  int   the old layout's number
-- RETURNS
--   {1, settings}  the settings after this call: "<limits>[ shards <number>][ layout <number>]". Between 'begin' and
--                  'switch', " to <new number of shards>" follows. Between 'switch' and 'settle', " from <old number of
--                  shards>" follows. A step that is not the next one changes nothing
--   {0}            the cache has no settings; nothing done
-- REPEAT  a second or late delivery finds that the step was taken
-- ERRORS  CORRUPT if the settings were not written by this library; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
local META = KEYS[1]
local STEP, SHARDS, LAYOUT = ARGV[1], ARGV[2], tonumber(ARGV[3])

local text = redis.call('HGET', META, 'settings')
if not text then return {0} end
local limits, rest = string.match(text, '^(%a+ capacity %d+/%d+/%d+ bytes %d+ ttl %d+/%d+/%d+)(.*)$')
local is_short = limits and (string.match(limits, '^lru ') or string.match(limits, '^tinylfu '))
for number in string.gmatch(limits or '', '%d+') do is_short = is_short and #number <= 16 end
local shards, verb, other, POWERS = '1', nil, nil, ' 1 2 4 8 16 32 64 128 256 '
local words = string.gsub(string.gsub(rest or '', '^ shards %d+', ''), '^ layout %d+', '')
if words ~= '' and not string.match(words, '^ to %d+$') and not string.match(words, '^ from %d+$') then
  is_short = false
end
if is_short then
  shards = string.match(rest, '^ shards (%d+)') or '1'
  verb, other = string.match(rest, ' (%a+) (%d+)$')
end
local layout = is_short and whole_number(string.match(rest, ' layout (%d+)'), 0)
if not layout or layout >= 1e6 - 1 or not string.find(POWERS, ' ' .. shards .. ' ', 1, true) then
  return corrupt(META, 'settings of another form')
end
local function divided(number) return number == '1' and '' or ' shards ' .. number end
local after
if STEP == 'begin' and layout == LAYOUT and verb ~= 'to' and verb ~= 'from' and shards ~= SHARDS then
  after = text .. ' to ' .. SHARDS
elseif STEP == 'switch' and layout == LAYOUT and verb == 'to' and other == SHARDS then
  after = limits .. divided(SHARDS) .. string.format(' layout %d from ', layout + 1) .. shards
elseif STEP == 'settle' and layout == LAYOUT + 1 and verb == 'from' and shards == SHARDS then
  after = limits .. divided(shards) .. string.format(' layout %d', layout)
end
if after then redis.call('HSET', META, 'settings', after) end
return {1, after or text}
