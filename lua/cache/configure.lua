-- configure: write the settings of a cache. All scripts of the cache read them, so the settings written last apply to
-- every process. A setting that the caller did not choose keeps its stored value.
-- KEYS
--   meta      HASH  <tag>:meta
--   new       ZSET  <tag>:new
--   cold      ZSET  <tag>:cold
--   ghost     ZSET  <tag>:ghost
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   schema    int   major version of the data model that the caller writes
--   settings  text  "<policy> capacity <hot>/<warm>/<cold> bytes <max> ttl <hot>/<warm>/<cold>". The TTLs are in ms;
--                   0 is no limit
--   given     text  one digit for each of the 8 values: 1 if the caller chose it, 0 if it applies only to a new cache
-- RETURNS
--   {1, now_ms, before, settings}  before: the previous settings, empty if there were none; settings: the new ones
--   {-1, schema}        the cache was written by another major version; nothing done
-- REPEAT  a second delivery finds the settings in place
-- ERRORS  CORRUPT if the schema in meta is not a number; nothing was written
-- COST    O(1); O(N log N) when the policy changes from tinylfu
--@include corrupt
--@include whole_number
local META, NEW, COLD, GHOST = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SCHEMA, SETTINGS, GIVEN = ARGV[1], ARGV[2], ARGV[3]
local FORM = '^(%a+) capacity (%d+)/(%d+)/(%d+) bytes (%d+) ttl (%d+)/(%d+)/(%d+)$'

local call = redis.call
local before = call('HMGET', META, 'settings', 'schema')
call('ZCARD', NEW)
call('ZCARD', COLD)
call('ZCARD', GHOST)
local schema = whole_number(before[2], tonumber(SCHEMA))
if not schema then return corrupt(META, 'a schema that is no number') end
if schema ~= tonumber(SCHEMA) then return {-1, schema} end
local time = call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local settings, have, want = SETTINGS, {string.match(before[1] or '', FORM)}, {string.match(SETTINGS, FORM)}
local is_usable = have[1] and true       -- false if a number is too long: another program has changed the settings
for i = 2, #have do is_usable = is_usable and #have[i] <= (i == 5 and 16 or 15) end
if is_usable then
  for i = 1, #want do if string.sub(GIVEN, i, i) == '0' then want[i] = have[i] end end
  settings = string.format('%s capacity %s/%s/%s bytes %s ttl %s/%s/%s', unpack(want))
end
if before[1] ~= settings then
  if before[1] and string.match(before[1], '^tinylfu') and not string.match(settings, '^tinylfu') then
    call('UNLINK', GHOST)                -- policy lru has neither ghosts nor a window
    if call('EXISTS', NEW) == 1 then
      call('ZUNIONSTORE', COLD, 2, COLD, NEW, 'AGGREGATE', 'MAX')
      call('UNLINK', NEW)
    end
  end
  call('HSET', META, 'schema', SCHEMA, 'settings', settings)
end
return {1, now_ms, before[1] or '', settings}
