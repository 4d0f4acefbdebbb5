-- delete: remove entries and void the leases on them, so that no value whose computing began before comes back.
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
--   entries...  STRING  <tag>:e:<key>, one for each name
--   leases...   HASH    <tag>:l:<key>, one for each name
-- ARGV
--   bus         text    channel of invalidations
--   origin      text    who deletes, for its own ears
--   names...    text    the stored names
-- RETURNS
--   {1, removed, version}  removed counts the values that were there
--   {0}         the cache has no settings; nothing done
-- REPEAT   a second or late delivery removes what it finds: a miss is never wrong
-- ERRORS   CORRUPT meta is not ours
-- COST     O(keys log N)
local META, SIZE, EXP, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GHOST, TRASH, ENTRIES = KEYS[8], KEYS[9], 9
local BUS, ORIGIN, NAMES = ARGV[1], ARGV[2], 2
--@include index
local count, removed = #ARGV - NAMES, 0
I.clock = I.clock + 1
I.removed = I.clock
for i = 1, count do
  local key = ARGV[NAMES + i]
  local freed = I.call('UNLINK', KEYS[ENTRIES + i])        -- the value of a cleared generation is nobody's entry
  if I.call('HEXISTS', SIZE, key) == 1 then
    removed = removed + freed
    I.remove(key)
  end
  I.call('UNLINK', KEYS[ENTRIES + count + i])
end
I.bury()
I.save()
for i = 1, count do I.call('SPUBLISH', BUS, 'd ' .. I.text(I.clock) .. ' ' .. ORIGIN .. ' ' .. ARGV[NAMES + i]) end
return {1, removed, I.clock}
