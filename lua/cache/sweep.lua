-- sweep: bounded housekeeping: expired entries, values of cleared generations, entries whose value the server dropped or
-- whose tag was invalidated, limits that were lowered, reporters long gone.
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
--   n           int     of each kind at most, 1 to 256
--   cursor      text    where in size to go on looking for dropped and invalidated values; 0 to begin
-- RETURNS
--   {1, expired, freed, orphans, evicted, more, cursor}  freed are of cleared generations or invalidated tags; more
--                                                    is 1 if expired entries or trash are left; cursor is text
--   {0}         the cache has no settings; nothing done
-- REPEAT   a second delivery goes on with what is left
-- ERRORS   CORRUPT meta is not ours
-- COST     O(n log N)
local META, SIZE, EXP, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GHOST, TRASH, GEN, TAGS = KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local N, CURSOR = math.min(256, tonumber(ARGV[1])), ARGV[2]
local HEAD = 511                         -- bytes that tell an entry's tags; one with longer ones is left to its reader
local WRITER_KEPT_MS = 3600000           -- a report is surely not repeated an hour later
--@include index
local page = I.call('HSCAN', SIZE, CURSOR, 'COUNT', N)
local fields, idle = I.call('HSCAN', META, 0, 'MATCH', 'w:*', 'COUNT', 256)[2], {}
for i = 1, #fields, 2 do
  local seen_ms = tonumber(string.match(fields[i + 1], '%d+$'))
  if not seen_ms or seen_ms < I.now_ms - WRITER_KEPT_MS then idle[#idle + 1] = fields[i] end
end
if #idle > 0 then I.call('HDEL', META, unpack(idle)) end
local expired, freed, orphans = I.reap(N), I.empty_trash(N), 0
local tagged, tag_floor = string.match(I.call('MGET', GEN)[1] or '', '^%d+ (%d+) (%d+)$')
tagged, tag_floor = tonumber(tagged or 0), tonumber(tag_floor or 0)
local function invalidated(key)          -- asked only where some tag was invalidated
  local head = redis.pcall('GETRANGE', I.prefix .. key, 0, HEAD)
  local version, tags = string.match(type(head) == 'string' and head or '', '^(%d+) %d+ %S+ %d+ %d+ (%S+) ')
  if not version or tonumber(version) > tagged then return false end
  local newest = tag_floor
  for tag in string.gmatch(tags, '[^,]+') do
    local mark = redis.pcall('ZSCORE', TAGS, tag)  -- of a wrong type it must not end this half-way: readers say so
    newest = math.max(newest, type(mark) == 'string' and tonumber(mark) or 0)
  end
  return tonumber(version) <= newest
end
for i = 1, #page[2], 2 do
  local key = page[2][i]
  if I.call('EXISTS', I.prefix .. key) == 0 and I.call('HEXISTS', SIZE, key) == 1 then
    local due_ms = I.next and I.call('ZSCORE', EXP, key)
    if not (due_ms and tonumber(due_ms) <= I.now_ms) then  -- else it has expired, and the next sweep counts it so
      I.remove(key)
      orphans = orphans + 1
    end
  elseif tagged > 0 and invalidated(key) and I.call('HEXISTS', SIZE, key) == 1 then
    I.remove(key)
    freed = freed + 1
  end
end
I.bury()
I.promoted = true                        -- look at every tier
I.balance()
I.bury()
if expired + freed + orphans + I.evicted > 0 then I.save() end  -- with nothing to do, a full server is no trouble
return {1, expired, freed, orphans, I.evicted, (expired == N or I.heaps > 0) and 1 or 0, page[1]}
