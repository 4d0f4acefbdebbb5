-- export: read entries of a closed shard, with all facts that another shard needs to adopt them. Writes nothing.
-- KEYS
--   meta        HASH    <tag>:meta
--   size        HASH    <tag>:size
--   new         ZSET    <tag>:new
--   hot         ZSET    <tag>:hot
--   warm        ZSET    <tag>:warm
--   cold        ZSET    <tag>:cold
--   ghost       ZSET    <tag>:ghost
--   deferred    LIST    <tag>:deferred
--   tags        ZSET    <tag>:tags
--   entries...  STRING  <tag>:e:<key>, one for each name
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   names...    text    the stored names, at most 256
-- RETURNS
--   {1, {entry, hits, tier, score, expiry_ms}, ...}  one list for each name. hits: number of reads; tier: 1 hot,
--                       2 warm, 3 cold, 4 new; score: the entry's score in this tier; expiry_ms: when the entry
--                       expires, ms since 1970, or -1 for never
--   {1, 0, ...}         0 in place of an entry that is absent, expired or invalidated
--   {0}                 the shard has no settings, and so no entries
-- REPEAT  a second delivery reads again
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(names + tags of the entries)
--@include corrupt
--@include whole_number
--@include index
--@include header
--@include live
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, TAGS, ENTRIES = KEYS[7], KEYS[8], KEYS[9], 9

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, true)
if not I then return refusal end
--@include reads
local names, values = {unpack(ARGV)}, redis.call('MGET', unpack(KEYS, ENTRIES + 1, ENTRIES + #ARGV))
local frozen = redis.call('HGET', META, 'frozen')
local sizes, tiers, scores = I.locate(names)
if not I.lfu and I.top == 3 then scores = I.call('ZMSCORE', COLD, unpack(names)) end
local reply = {1}
for p = 1, #names do
  local expiry_ms, score = I.call('PEXPIRETIME', KEYS[ENTRIES + p]), tonumber(scores[p] or nil)
  local found = sizes[p] and tiers[p] and score and score >= 0 and score < 1.4e17 and expiry_ms ~= -2
    and live(I.call, values[p], frozen, TAGS)
  if found then
    local hits = I.unpack_size(sizes[p])
    reply[p + 1] = {values[p], hits, tiers[p], I.text(score), expiry_ms}
  else
    reply[p + 1] = 0
  end
end
return reply
