-- get_strict: read one value and note the read at once, so that all processes share one exact LRU order.
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
--   entry       STRING  <tag>:e:<key>
--   gen         STRING  <tag>:gen
-- ARGV
--   key         text    its stored name
--   misses      int     what to count where there is no value: 1, or 0 if the caller counts
-- RETURNS
--   {1, entry, gen}  a value, perhaps a dead one: the reader compares it with gen (empty: nothing was ever invalidated)
--   {2}         no value
--   {0}         the cache has no settings; nothing done
-- REPEAT   a second delivery counts the read twice
-- ERRORS   CORRUPT meta is not ours
-- COST     O(log N)
local META, SIZE, EXP, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GHOST, TRASH, ENTRY, GEN = KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local KEY, MISSES = ARGV[1], tonumber(ARGV[2])
--@include index
local found = I.call('MGET', ENTRY, GEN)
local version, floor = string.match(found[1] or '', '^%d+'), string.match(found[2] or '', '^%d+')
if not found[1] or (version and floor and tonumber(version) <= tonumber(floor)) then
  if MISSES > 0 then
    I.counters = {MISSES, 0, 0}
    I.save()
  end
  return {2}
end
I.touch({KEY}, {1})
I.balance()
I.bury()
I.save()
return {1, found[1], found[2] or ''}
