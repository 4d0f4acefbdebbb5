-- sweep: take one bounded step of maintenance. Removes expired entries, entries whose value the server dropped, entries
-- with an invalidated tag, and entries beyond a lowered capacity. Also removes cleared values, and the stored
-- idempotency key of each process that has sent no report for an hour.
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
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   n         int     max cleared values to free, and approximate number of entries to check for missing and
--                     invalidated values; 1 to 256
--   cursor    text    HSCAN cursor in size, at which the check of entries continues; 0 to start
-- RETURNS
--   {1, expired, freed, orphans, evicted, more, cursor}  expired: number of expired entries; freed: number of cleared
--                       and invalidated values; orphans: number of entries whose value the server dropped. An entry
--                       without a value counts as an orphan if no entry of the cache can have expired yet; otherwise it
--                       counts as expired. evicted: number of evicted entries; more: 1 if cleared values are left, else
--                       0; cursor: text, for the next call
--   {0}                 the cache has no settings, or its entries are being moved to another layout; nothing done
-- REPEAT  a second delivery takes another step
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O((n + evictions) log N) for N entries; a call evicts at most 512
--@include corrupt
--@include whole_number
--@include index
--@include expiry
--@include cleared
--@include header
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, EPOCHS, TAGS = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local N, CURSOR = math.min(256, tonumber(ARGV[1])), ARGV[2]
-- The last offset that this script reads in an entry. If the tags of an entry extend beyond this offset, only readers
-- check the tags.
local HEAD = 511
local WRITER_KEPT_MS = 3600000           -- no report is repeated after an hour

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then return refusal end
I.call('LLEN', DEFERRED)                 -- if the type is wrong, this fails before the first write
local page = I.call('HSCAN', SIZE, CURSOR, 'COUNT', N)
local fields, idle = I.call('HSCAN', META, 0, 'MATCH', 'w:*', 'COUNT', 256)[2], {}
for i = 1, #fields, 2 do
  local seen_ms = whole_number(string.match(fields[i + 1], '%d+$'))
  if not seen_ms or seen_ms < I.now_ms - WRITER_KEPT_MS then idle[#idle + 1] = fields[i] end
end
if #idle > 0 then I.call('HDEL', META, unpack(idle)) end
if I.next and I.now_ms >= I.next then expire(I) end
local freed, orphans = free_cleared(I, N), 0
local tagged, merged = string.match(I.call('MGET', EPOCHS)[1] or '', '^%d+ (%d+) (%d+)$')
tagged, merged = tonumber(tagged or 0), tonumber(merged or 0)
local function invalidated(key)          -- called only if a tag was invalidated
  local head = redis.pcall('GETRANGE', I.prefix .. key, 0, HEAD)
  local version, _, _, _, _, tags = read_header(type(head) == 'string' and head)
  if not version or tags == '' or version > tagged then return false end
  local newest = merged
  for tag in string.gmatch(tags, '[^,]+') do
    local mark = redis.pcall('ZSCORE', TAGS, tag)  -- a wrong type must not abort the script: readers report the fault
    newest = math.max(newest, type(mark) == 'string' and tonumber(mark) or 0)
  end
  return version <= newest
end
for i = 1, #page[2], 2 do
  local key = page[2][i]
  if I.call('EXISTS', I.prefix .. key) == 0 and I.call('HEXISTS', SIZE, key) == 1 then
    I.remove(key)
    if I.next and I.now_ms >= I.next then I.expired = I.expired + 1 else orphans = orphans + 1 end
  elseif tagged > 0 and invalidated(key) and I.call('HEXISTS', SIZE, key) == 1 then
    I.remove(key)
    freed = freed + 1
  end
end
I.delete_dropped()
I.promoted = true                        -- so that I.balance handles every tier
I.balance()
I.delete_dropped()
if I.expired + freed + orphans + I.evicted > 0 then I.save() end  -- avoid a needless write: a full server refuses it
return {1, I.expired, freed, orphans, I.evicted, I.deferred_count > 0 and 1 or 0, page[1]}
