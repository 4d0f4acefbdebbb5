-- adopt: store entries of the old layout in a shard of the new layout; relayout.lua explains layouts. An entry is not
-- stored if its key has been written, removed or invalidated in the new layout since expect.lua marked the key.
-- KEYS
--   meta        HASH    <tag>:meta
--   size        HASH    <tag>:size
--   new         ZSET    <tag>:new
--   hot         ZSET    <tag>:hot
--   warm        ZSET    <tag>:warm
--   cold        ZSET    <tag>:cold
--   ghost       ZSET    <tag>:ghost
--   deferred    LIST    <tag>:deferred
--   epochs      STRING  <tag>:epochs
--   tags        ZSET    <tag>:tags
--   marks       HASH    <tag>:marks
--   entries...  STRING  <tag>:e:<key>, one for each entry
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}, with the shard.
-- ARGV
--   parts...    bytes   seven values for each entry: its stored name; its mark (see expect.lua); the five values that
--                       export.lua has returned for it: entry, hits, tier, score, expiry_ms
-- RETURNS
--   {1, done, ...}  done is 1 or 0 for each entry. 1: the entry is stored in this shard, or must not be stored here. In
--                   both cases, the caller may remove it from the old layout. 0: the key no longer has this mark, and
--                   nothing is stored; the caller marks the key and reads the entry again
--   {0}             the shard has no settings, was not prepared (see prepare.lua), or is closed; nothing done
-- REPEAT  a second or late delivery finds the marks gone, and stores nothing
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O((entries + evictions) log N) for N entries of the shard; a call evicts at most 512
--@include corrupt
--@include whole_number
--@include index
--@include header
--@include live
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, EPOCHS, TAGS, MARKS, ENTRIES = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11], 11
local PARTS = 7                          -- arguments for each entry

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then return refusal end
if not redis.call('HGET', META, 'moving') then return {0} end
local call, reply, epochs = I.call, {1}, redis.call('GET', EPOCHS)
call('ZCARD', TAGS)
call('HLEN', MARKS)
call('ZCARD', HOT)
call('ZCARD', WARM)
for i = 1, #ARGV / PARTS do
  local at, done = (i - 1) * PARTS, 0
  local name, mark, value, hits = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 4])
  local tier, score, expiry_ms = tonumber(ARGV[at + 5]), ARGV[at + 6], tonumber(ARGV[at + 7])
  if call('HEXISTS', SIZE, name) == 1 then
    done = 1                             -- the key was written here, or its entry was adopted before
  elseif I.marks and call('HGET', MARKS, name) == mark then
    done = 1
    call('HDEL', MARKS, name)
    local weight = #name + #value - 8    -- bytes without version and expiry, as in put.lua
    if string.sub(value, 9, 9) == '+' then weight = weight - #string.match(value, '^%d* ?', 15) end
    local expired = expiry_ms >= 0 and expiry_ms <= I.now_ms
    if live(call, value, epochs, TAGS) and not expired and not (I.max_bytes > 0 and weight > I.max_bytes) then
      if tier == 4 and not I.lfu then tier = 3 end
      if tier < 3 and I.capacity[tier] == 0 then tier = 3 end
      call('HSET', SIZE, name, I.pack_size(math.min(hits, MAX_HITS), weight))
      call('ZADD', I.tier[tier], score, name)
      if expiry_ms > 0 then
        I.next = math.min(I.next or expiry_ms, expiry_ms)
        call('SET', KEYS[ENTRIES + i], value, 'PXAT', I.text(expiry_ms))
      else
        call('SET', KEYS[ENTRIES + i], value)
      end
      I.n, I.bytes = I.n + 1, I.bytes + weight
      if tier == 4 then I.newcomers = I.newcomers + 1 end
    end
  end
  reply[i + 1] = done
end
I.promoted = true
I.balance()
I.delete_dropped()
I.save()
return reply
