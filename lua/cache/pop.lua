-- pop: return one value, and remove it and its compute lease. Of several callers, only one gets the value.
-- KEYS
--   meta      HASH    <tag>:meta
--   size      HASH    <tag>:size
--   new       ZSET    <tag>:new
--   hot       ZSET    <tag>:hot
--   warm      ZSET    <tag>:warm
--   cold      ZSET    <tag>:cold
--   ghost     ZSET    <tag>:ghost
--   deferred  LIST    <tag>:deferred
--   entry     STRING  <tag>:e:<key>
--   lease     HASH    <tag>:l:<key>
--   epochs    STRING  <tag>:epochs
--   tags      ZSET    <tag>:tags
--   resent    ZSET    <tag>:resent
--   reply     STRING  <tag>:r:<id>  the entry that this request has removed, or a blank if the request found no value;
--                     expires after until_ms
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   key       text    stored name of the key
--   until_ms  int     server time after which this request is refused, ms
--   id        text    the request id, random
--   seen      text    empty on the first delivery, any other text on a repeated one
--   bus       text    channel of invalidations
--   origin    text    id of the calling process; messages on the bus contain it
-- RETURNS
--   {1, entry, version}  the entry was removed, now or by an earlier copy of the request; version is the cache's clock
--   {2}                  there is no value, or it was invalidated; nothing removed
--   {0}                  the cache has no settings, or its entries are being moved to another layout; nothing done
--   {-5, clock}          this delivery did nothing: the request was cancelled, or this is a repeated delivery that
--                        arrived after until_ms. In the second case, an earlier copy may have been executed
--   {-6, now_ms}         the first delivery arrived after until_ms; nothing done
-- REPEAT  the first executed copy leaves the entry in <tag>:r:<id>, and all other copies return it. A repeated delivery
--         that finds no value leaves a blank there, so that no late copy removes a newer value. If the entries began to
--         move to another layout after the first delivery, a repeated delivery still returns the entry that an earlier
--         copy has left. The version in this reply is 0
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(log N) for N entries. The value is renamed, not copied; its memory is freed after until_ms
--@include corrupt
--@include whole_number
--@include index
--@include header
--@include live
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, ENTRY, LEASE, EPOCHS = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local TAGS, RESENT, REPLY = KEYS[12], KEYS[13], KEYS[14]
local KEY, UNTIL_MS, ID, SEEN, BUS, ORIGIN = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then
  local kept = SEEN ~= '' and refusal[1] == 0 and redis.call('GET', REPLY)
  if not kept then return refusal end
  return kept == ' ' and {2} or {1, kept, 0}
end
if I.now_ms > UNTIL_MS then
  if SEEN ~= '' then return {-5, I.clock} end
  return {-6, I.now_ms}
end
local found = I.call('MGET', REPLY, ENTRY, EPOCHS)
if found[1] == ' ' then return {2} end
if found[1] then return {1, found[1], I.clock} end
if I.resent >= I.now_ms and I.call('ZSCORE', RESENT, ID) then return {-5, I.clock} end
if not live(I.call, found[2], found[3], TAGS) then
  if SEEN ~= '' then I.call('SET', REPLY, ' ', 'PX', I.text(UNTIL_MS - I.now_ms + 1)) end
  return {2}
end
I.clock = I.clock + 1
I.removed = I.clock
if I.marks then I.call('HDEL', I.marks, KEY) end
I.call('RENAME', ENTRY, REPLY)
I.call('PEXPIREAT', REPLY, I.text(UNTIL_MS + 1))
if I.call('HEXISTS', SIZE, KEY) == 1 then I.remove(KEY) end
I.delete_dropped(LEASE)
I.save()
I.call('SPUBLISH', BUS, 'd ' .. I.text(I.clock) .. ' ' .. ORIGIN .. ' ' .. KEY)
return {1, found[2], I.clock}
