-- retire: delete the keys of an empty shard of the old layout, except meta, epochs and tags; relayout.lua explains
-- layouts. For keep_ms, meta and epochs still show that the shard is closed (fence.lua). So late requests and reads
-- notice that there is a new layout.
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
--   history   HASH    <tag>:history
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   keep_ms   int     TTL of epochs and tags, ms; also of meta, unless meta holds the settings of the whole cache
-- RETURNS
--   {1}         done, by this call or an earlier one
--   {0, n}      nothing done; n: number of entries that are left, plus number of clears whose values are not freed yet
-- REPEAT  a second delivery finds the keys deleted, and sets the TTLs again
-- ERRORS  a wrong type of meta, size or deferred is refused; nothing was written
-- COST    O(1); the server frees the memory of the unlinked keys in the background
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, EPOCHS, TAGS, HISTORY = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local KEEP_MS = ARGV[1]

local call = redis.call
local left = call('HLEN', SIZE) + call('LLEN', DEFERRED)
if left > 0 then return {0, left} end
local names, kept = {'settings', 'schema', 'frozen', 'clock'}, {}
local m = call('HMGET', META, unpack(names))
for i, name in ipairs(names) do
  if m[i] then kept[#kept + 1] = name; kept[#kept + 1] = m[i] end
end
call('UNLINK', META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, HISTORY)
if #kept > 0 then call('HSET', META, unpack(kept)) end
if string.match(m[1] or '', ' closed$') then call('PEXPIRE', META, KEEP_MS) end
call('PEXPIRE', EPOCHS, KEEP_MS)
call('PEXPIRE', TAGS, KEEP_MS)
return {1}
