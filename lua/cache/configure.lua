-- configure: write the settings of a cache. Scripts that need the settings read them on every call, so the settings
-- written last apply to every process. If the caller did not choose a setting, the stored value stays.
-- KEYS
--   meta      HASH  <tag>:meta
--   new       ZSET  <tag>:new
--   cold      ZSET  <tag>:cold
--   ghost     ZSET  <tag>:ghost
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}. If a cache has several shards, a call gets the keys
--   of the whole cache or the keys of one shard. Such a cache uses the meta of the whole cache only for the
--   settings. The settings of a shard contain the shard's share of the limits.
-- ARGV
--   schema    int   major version of the data model that the caller writes
--   settings  text  "<policy> capacity <hot>/<warm>/<cold> bytes <max> ttl <hot>/<warm>/<cold>[ shards <number>]". The
--                   TTLs are in ms. A TTL of 0 or a <max> of 0 means no limit. Without "shards", there is one shard.
--                   relayout.lua appends more words to the stored text, and this script keeps them
--   given     text  one digit for each of the 9 values in settings, in the same order: 1 if the caller chose the value,
--                   0 if the value applies only to a new cache
--   share     int   min capacity of each shard, entries; applies only if there are several shards
-- RETURNS
--   {1, now_ms, before, settings}  before: the previous settings, empty if there were none; settings: the new ones
--   {-1, schema}        the cache was written by another major version; nothing done
--   {-3, before}        a change of the layout has begun and waits for its step 'switch' (see relayout.lua), or the
--                       shard was closed because its entries move to another layout; nothing done
--   {-2, before}        the caller chose another number of shards, or limits too small for the shards; nothing done
-- REPEAT  a second delivery finds the settings in place
-- ERRORS  CORRUPT if the schema in meta is not a number; nothing was written
-- COST    O(1); O(N log N) for N entries when the policy changes from tinylfu to lru
--@include corrupt
--@include whole_number
local META, NEW, COLD, GHOST = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SCHEMA, SETTINGS, GIVEN, SHARE = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local FORM = '^(%a+) capacity (%d+)/(%d+)/(%d+) bytes (%d+) ttl (%d+)/(%d+)/(%d+)$'

local call = redis.call
local before = call('HMGET', META, 'settings', 'schema', 'layout')
call('ZCARD', NEW)
call('ZCARD', COLD)
call('ZCARD', GHOST)
local schema = whole_number(before[2], tonumber(SCHEMA))
if not schema then return corrupt(META, 'a schema that is no number') end
if schema ~= tonumber(SCHEMA) then return {-1, schema} end
local time = call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
-- Decode a settings text. Returns nil if the text does not have the form of settings, or if a number has too many
-- digits. Another program may have changed the stored text.
local function values(text)
  local limits, shards, rest = string.match(text, '^(.-) shards (%d+)(.*)$')
  if not limits then limits, rest = string.match(text, '^(.-)( layout %d+.*)$') end
  local found = {string.match(limits or text, FORM)}
  if not found[1] then return nil end
  found[9] = shards or '1'
  for i = 2, 9 do if #found[i] > (i == 5 and 16 or i == 9 and 3 or 15) then return nil end end
  found[10] = rest or ''
  if found[10] ~= '' and not string.match(found[10], '^ layout %d%d?%d?%d?%d?%d?$')
    and not string.match(found[10], '^ layout %d%d?%d?%d?%d?%d? from %d%d?%d?$') then return nil end
  return found
end
if before[1] and (string.match(before[1], '%d to %d+$') or string.match(before[1], ' closed$')) then
  return {-3, before[1]}
end
local settings, have, want = SETTINGS, values(before[1] or ''), values(SETTINGS)
if have then
  for i = 1, 9 do if string.sub(GIVEN, i, i) == '0' then want[i] = have[i] end end
  local shards, total = tonumber(want[9]), want[2] + want[3] + want[4]
  local fits = want[9] == have[9] and (shards == 1 or total >= shards * SHARE)
  for i = 2, 5 do fits = fits and (shards == 1 or want[i] == '0' or tonumber(want[i]) >= shards) end
  if not fits then return {-2, before[1]} end
  settings = string.format('%s capacity %s/%s/%s bytes %s ttl %s/%s/%s', unpack(want, 1, 8))
  if shards > 1 then settings = settings .. ' shards ' .. want[9] end
  settings = settings .. have[10]
end
local layout = not before[1] and whole_number(before[3])
if layout and layout < 1e6 then          -- drop.lua has kept the number: a new cache must not start again at layout 0
  settings = settings .. ' layout ' .. string.format('%d', layout)
  call('HDEL', META, 'layout')
  call('PERSIST', META)
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
