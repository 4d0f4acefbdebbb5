-- put: store one value, record the reads that the process reports, and evict entries beyond the limits. With a mode,
-- store the value only on a condition, give the stored value a new TTL, or add to a stored number.
-- KEYS
--   meta       HASH    <tag>:meta
--   size       HASH    <tag>:size
--   new        ZSET    <tag>:new
--   hot        ZSET    <tag>:hot
--   warm       ZSET    <tag>:warm
--   cold       ZSET    <tag>:cold
--   ghost      ZSET    <tag>:ghost
--   deferred   LIST    <tag>:deferred
--   entry      STRING  <tag>:e:<key>  the header (header.lua), then the value
--   lease      HASH    <tag>:l:<key>
--   epochs     STRING  <tag>:epochs
--   tags       ZSET    <tag>:tags
--   resent     ZSET    <tag>:resent
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}. With a mode, <tag>:r:<id> is read and written too.
--   This STRING holds the reply of the request as "<status> <version> <number>". It expires after until_ms.
-- ARGV
--   key        text    stored name of the key
--   payload    bytes   the entry without version and expiry; see entry_format.payload
--   id         text    the request id, random
--   until_ms   int     server time after which this request is refused, ms
--   seen       text    empty on the first delivery; on a repeated one, the newest version that the caller knew before
--                      the first delivery
--   ttl_ms     text    TTL, ms; 0: the value never expires; -1: the default of the entry's tier. Or three such numbers,
--                      "<hot>/<warm>/<cold>"; the number of the entry's tier applies
--   tier       int     1 hot, 2 warm, 3 cold; 0: an existing entry keeps its tier, and the policy chooses the tier of a
--                      new entry
--   token      text    token of the compute lease under which the value was computed; empty for a plain put
--   mode       text    empty: store the payload in any case; 'add': only if there is no value; 'replace': only if there
--                      is one; 'if:<version>': only if the value has this version (0: only if there is no value);
--                      'touch': store the old value again with ttl_ms, and keep its version; 'incr:<by>': add <by> to
--                      the stored number and keep its TTL and tags (if there is no value, store the payload);
--                      'incrxx:<by>': as 'incr:<by>', but only if there is a value. With a mode, token is empty
--   bus        text    channel of invalidations
--   origin     text    id of the writing process; messages on the bus contain it
--   writer     text    the reporting process
--   seq        int     idempotency key of the report, a number that rises with each report of the writer; 0 if there is
--                      no report
--   misses     int     misses since the last report
--   saved_ms   int     computing time that hits have saved since the last report, ms
--   corrupt    int     undecodable entries found since the last report
--   tag_count  int     number of tags
--   tags...    text    percent-encoded
--   reads...   text    for each key that was read: the key, then its number of reads; oldest read first
-- RETURNS
--   {1, version, evicted}  stored; evicted: number of evicted entries, 0 if an earlier copy was executed
--   {2, version, number}   'incr' or 'incrxx': stored; number is the new value
--   {0}                    the cache has no settings, or its entries are being moved to another layout; nothing done
--   {0, 1}                 as {0}, but this is a repeated delivery: an earlier copy may have been executed
--   {-1}                   the lease was lost; nothing done
--   {-2, version}          the value alone exceeds the cache's limit of bytes; the old value is removed
--   {-2, 0, 0}             'incr': the entry with the new number exceeds the limit of bytes; the old number stays
--   {-3}                   after the lease was claimed, the cache was cleared, or a tag of the value was (or may have
--                          been) invalidated; the lease is released, and nothing else is done
--   {-4, version}          the value does not fit even after 512 evictions. The old value is removed, but in the modes
--                          'incr' and 'incrxx', an old number stays
--   {-5, version}          the request was cancelled, or an earlier repeated delivery was executed; nothing done
--   {-5, version}          with a mode: this is a repeated delivery that arrived after until_ms and did nothing; an
--                          earlier copy may have been executed
--   {-5, version}          without a mode: an earlier copy may have stored a value that was replaced since; the key is
--                          made a miss
--   {-6, now_ms}           this delivery arrived after until_ms and did nothing; with a mode, it was the first delivery
--   {-7, 0, 0}             the condition of the mode does not hold; nothing stored
--   {-8, 0, 0}             'incr': the stored value is no whole number between -2^53 and 2^53; nothing stored
--   {-9, 0, 0}             'incr': the sum would not be between -2^53 and 2^53; nothing stored
-- REPEAT  a copy that finds its id in the entry returns success again. With a lease, a second copy finds that the lease
--         is gone. A repeated report of reads finds its seq recorded. After until_ms, every copy is refused.
--         Without a mode and without a lease, a repeated delivery writes only if the key cannot have changed since the
--         first delivery was sent. This is certain in two cases. In the first case, the entry is no newer than `seen`.
--         In the second case, the key has neither an entry nor a field in size, and no entry of the cache was removed
--         after `seen`. If neither case applies, the delivery makes the key a miss, which is never wrong. In all three
--         cases, the delivery leaves its id in resent, so that later copies do nothing. When a caller gives up,
--         cancel_puts.lua writes the id to resent. All these rules together ensure that no late or repeated copy
--         overwrites a newer value.
--         With a mode, the first executed copy leaves its reply in <tag>:r:<id>, and all other copies return this
--         reply. There are two exceptions. If the first delivery stores nothing, it leaves no reply, so a repeated
--         delivery checks the condition again. If a repeated delivery returns {-2, version} or {-4, version}, it leaves
--         its id in resent instead of a reply. A full server whose maxmemory-policy is volatile-* may evict the reply;
--         even then, a copy that finds its id in the entry reports success. If the entries begin to move to another
--         layout between two deliveries, the later one still returns the reply that the earlier one has left.
-- ERRORS  CORRUPT if meta, epochs or the reply of the request was not written by this library
-- COST    O((reads + evictions) log N) for N entries; a call evicts at most 512
--@include corrupt
--@include whole_number
--@include index
--@include header_writer
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED, ENTRY, LEASE, EPOCHS = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local TAGS, RESENT = KEYS[12], KEYS[13]
local KEY, PAYLOAD, ID, UNTIL_MS, SEEN = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local TTL_MS, TIER, TOKEN, MODE = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]
local BUS, ORIGIN, WRITER, SEQ = ARGV[10], ARGV[11], ARGV[12], tonumber(ARGV[13])
local MISSES, SAVED_MS, CORRUPT = ARGV[14], ARGV[15], ARGV[16]
local TAG_COUNT, FIRST_TAG = tonumber(ARGV[17]), 18

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, false, KEY)
if not I then
  if SEEN == '' or refusal[1] ~= 0 then return refusal end
--@include recorded
  local kept = MODE ~= '' and redis.call('GET', string.sub(META, 1, -5) .. 'r:' .. ID)
  return kept and recorded(kept) or {0, 1}
end
local call = I.call
if I.now_ms > UNTIL_MS then
  if MODE ~= '' and SEEN ~= '' then return {-5, I.clock} end  -- an earlier copy may have been executed
  return {-6, I.now_ms}
end

-- From here to the report of reads, the script decides whether an earlier copy, the mode or the lease forbids the put.
local doubt, payload, old, verb, number, REPLY = false, PAYLOAD, nil, nil, nil, nil
if MODE ~= '' then
-- These files are not included at the top: most puts do not need them, and creating a function takes about 0.2 us.
--@include header
--@include live
--@include integer
--@include recorded
  REPLY = string.sub(META, 1, -5) .. 'r:' .. ID
  local found = call('MGET', REPLY, ENTRY, EPOCHS)
  if found[1] then return recorded(found[1]) or corrupt(REPLY, 'no reply of a request') end
  if (SEEN ~= '' or I.resent >= I.now_ms) and call('ZSCORE', RESENT, ID) then return {-5, I.clock} end
  local operand, failed = nil, 0
  verb, operand = string.match(MODE, '^(%a+):?(%-?%d*)$')
  local creates = verb ~= 'incrxx'
  if not creates then verb = 'incr' end
  local present, cost_ms = live(call, found[2], found[3], TAGS)
  local _, request, expiry, _, fresh, tags, key_at, value_at = read_header(present and found[2])
  if present and request == string.sub(ID, 1, 5) then
    -- Another copy was executed, and the server has evicted its reply.
    local held = verb == 'incr' and decode_integer(string.sub(found[2], value_at, value_at + 10))
    return {held and 2 or 1, present, held or 0}
  end
  if verb == 'add' then failed = present and -7 or 0
  elseif verb == 'if' then failed = (present or 0) ~= tonumber(operand) and -7 or 0
  elseif verb ~= 'incr' then failed = present and 0 or -7
  elseif present then
    local before = decode_integer(string.sub(found[2], value_at, value_at + 10))
    number = before and before + tonumber(operand)
    if not number then failed = -8 elseif not (number > -2^53 and number < 2^53) then failed = -9 end
  elseif creates then number = tonumber(operand)
  else failed = -7 end
  if failed == 0 and verb == 'touch' then
    old = {version = present}
    payload = string.sub(found[2], 9)
    if string.byte(payload) == 43 then   -- "+": remove the expiry of the stored entry, since a payload has none
      payload = string.sub(payload, 1, 6) .. string.sub(payload, string.find(payload, ' ', 7, true) + 1)
    end
  elseif failed == 0 and verb == 'incr' and present then  -- keep tags, key, and the time when the value gets stale
    local left_ms = expiry ~= '0' and math.max(0, tonumber(expiry) - I.now_ms) or call('PTTL', ENTRY)
    old = {version = present, left_ms = left_ms}
    local fresh_ms = whole_number(fresh)
    if fresh_ms > 0 then
      fresh_ms = math.max(1, fresh_ms - math.max(0, math.floor((I.clock - present) / 100)))
    end
    local key, facts = string.sub(found[2], key_at, value_at - 1), ''
    if string.sub(found[2], 9, 9) == '+' then
      facts = cost_ms .. ' ' .. I.text(fresh_ms) .. ' ' .. tags .. ' ' .. #key .. ' ' .. key
    end
    payload = string.sub(found[2], 9, 9) .. string.sub(ID, 1, 5) .. facts .. encode_integer(number)
  end
  if failed == 0 and verb == 'incr' and I.max_bytes > 0 and #KEY + #payload > I.max_bytes then failed = -2 end
  if failed < 0 then
    if SEEN ~= '' then call('SET', REPLY, failed .. ' 0 0', 'PX', I.text(UNTIL_MS - I.now_ms + 1)) end
    return {failed, 0, 0}
  end
elseif SEEN ~= '' or I.resent >= I.now_ms then
--@include header
  local stored = call('MGET', ENTRY)[1]
  local version, request = read_header(stored)
  if version and request == string.sub(ID, 1, 5) then return {1, version, 0} end
  if call('ZSCORE', RESENT, ID) then return {-5, I.clock} end
  if SEEN ~= '' and TOKEN == '' then
    call('ZCARD', RESENT)
    local seen = tonumber(SEEN)
    if stored then doubt = not version or version > seen
    else doubt = (tonumber(I.removed or nil) or 0) > seen or call('HEXISTS', SIZE, KEY) == 1 end
  end
end
if TOKEN ~= '' then
  local lease, epochs = call('HMGET', LEASE, 'token', 'version', 'waited'), call('GET', EPOCHS)
  if lease[1] ~= TOKEN then return {-1} end
  if epochs then
    -- If another program has replaced the lease's version by something that is no number, use -1. Every epoch is newer
    -- than -1, so the put is refused.
    local claimed = whole_number(lease[2]) or -1
    local cleared, merged = string.match(epochs, '^(%d+) %d+ (%d+)$')
    if not cleared then return corrupt(EPOCHS, 'no three versions') end
    local stale = tonumber(cleared) > claimed or (TAG_COUNT > 0 and tonumber(merged) > claimed)
    for i = FIRST_TAG, FIRST_TAG + TAG_COUNT - 1 do
      stale = stale or tonumber(call('ZSCORE', TAGS, ARGV[i]) or 0) > claimed
    end
    if stale then
      call('UNLINK', LEASE)
      if lease[3] then call('SPUBLISH', BUS, 'r 0 ' .. ORIGIN .. ' ' .. KEY) end
      return {-3}
    end
  end
end

if SEQ > 0 then
--@include reads
  local keys, counts = {}, {}
  for i = FIRST_TAG + TAG_COUNT, #ARGV, 2 do
    keys[#keys + 1] = ARGV[i]
    counts[#counts + 1] = tonumber(ARGV[i + 1])
  end
  I.report(WRITER, SEQ, keys, counts, {tonumber(MISSES), tonumber(SAVED_MS), tonumber(CORRUPT)})
end
if I.next and I.now_ms >= I.next then
--@include expiry
  expire(I)
end
if I.deferred_count > 0 then
--@include cleared
  free_cleared(I, 16)
end
I.tick(1, 0)
if I.marks then call('HDEL', I.marks, KEY) end
local version, weight = I.clock, #KEY + #payload
local version_text = I.text(version)

local refused = doubt and -5 or (I.max_bytes > 0 and weight > I.max_bytes) and -2 or 0
if refused < 0 then                      -- remove the old value, which the put would have replaced
  if call('HEXISTS', SIZE, KEY) == 1 then I.remove(KEY) end
  I.delete_dropped(LEASE)
else
  local f, packed, before = 0, I.pack_size(0, weight), nil
  local known = call('HSETNX', SIZE, KEY, packed) == 0
  local tier = TIER > 0 and TIER or nil
  if known and I.next and I.now_ms >= I.next and call('EXISTS', ENTRY) == 0 then
    known = false                        -- the entry has expired
    I.remove(KEY)
    I.delete_dropped()
    I.expired = I.expired + 1
    call('HSET', SIZE, KEY, packed)
  end
  if known then                          -- the entry keeps its tier unless the caller chose one
    before = call('HGET', SIZE, KEY)
    local hits, replaced = I.unpack_size(before)
    I.bytes = I.bytes - replaced
    if old then packed = I.pack_size(hits, weight) end
    if packed ~= before then call('HSET', SIZE, KEY, packed) end
    if I.lfu or I.top < 3 then
      local i, score = I.top, nil
      repeat                             -- find the tier of the entry
        score = (i == 4 or I.capacity[i] > 0) and tonumber(call('ZSCORE', I.tier[i], KEY) or nil)
        if not score then i = i + 1 end
      until score or i > (I.lfu and 4 or 3)
      if not score then i = nil end
      if I.lfu and score then f = math.min(15, I.frequency(score) + 1) end
      if tier and i and tier ~= i then
        call('ZREM', I.tier[i], KEY)
        if i == 4 then I.newcomers = I.newcomers - 1 end
      end
      tier = tier or i
    end
  else
    I.n = I.n + 1
    if I.lfu then                        -- frequency of a new entry: 1, plus the frequency in GHOST
      f = 1
      local ghost = tonumber(I.remembered or nil)
      if ghost then
        local at, remembered = I.unpack_score(ghost)
        f = I.aged(at, remembered % 8) + 1
        if remembered >= 8 then
          -- The key was evicted from the window. If a window that is wider by 10 % of the cache might still hold the
          -- key, signal to widen the window.
          local rank = I.share(0.1)
          local mark = tonumber(call('ZREVRANGE', GHOST, rank, rank, 'WITHSCORES')[2])
          if not mark or ghost > mark then I.adapt(1) end
        end
        call('ZREM', GHOST, KEY)
      end
    end
  end
  tier = tier or (I.lfu and 4 or 3)
  if tier < 4 and I.capacity[tier] == 0 then tier = 3 end
  if tier < 3 then I.promoted = true end
  local added = call('ZADD', I.tier[tier], I.text(I.pack_score(version, f)), KEY)
  if tier == 4 then I.newcomers = I.newcomers + added end
  I.bytes = I.bytes + weight
  local ttl_ms = tonumber(TTL_MS)
  if old and number then ttl_ms = old.left_ms >= 0 and math.max(1, old.left_ms) or 0 end
  if not ttl_ms then ttl_ms = tonumber(({string.match(TTL_MS, '^(%-?%d+)/(%-?%d+)/(%-?%d+)$')})[math.min(tier, 3)]) end
  if ttl_ms < 0 then ttl_ms = tonumber(I.ttl_ms[tier]) end
  local expiry_ms = ttl_ms > 0 and I.now_ms + ttl_ms or 0
  if ttl_ms > 0 and (not I.next or expiry_ms < I.next) then I.next = expiry_ms end
  I.balance(KEY)
  if I.max_bytes > 0 and I.bytes > I.max_bytes then
    if number and old and known then     -- incr: the old number stays; its tier, rank and expiry are already right
      local _, kept = I.unpack_size(before)
      I.bytes = I.bytes - weight + kept
      call('HSET', SIZE, KEY, before)
    else
      I.remove(KEY)
    end
    refused = -4
  end
  local touched = verb == 'touch'        -- a touch keeps the value, and the lease of a running computation
  I.delete_dropped(not touched and LEASE or nil)
  if refused == 0 then
    local expiry = I.text(expiry_ms)
    local value = write_entry(version_digits(touched and old.version or version), expiry, payload)
    if ttl_ms > 0 then call('SET', ENTRY, value, 'PXAT', expiry) else call('SET', ENTRY, value) end
    -- Publish the put even if the key was absent: a process may still have a local copy of an evicted entry.
    call('SPUBLISH', BUS, 's ' .. version_text .. ' ' .. ORIGIN .. ' ' .. KEY)
    if REPLY then
      local reply = (number and '2 ' or '1 ') .. version_text .. ' ' .. I.text(number or 0)
      call('SET', REPLY, reply, 'PX', I.text(UNTIL_MS - I.now_ms + 1))
    end
  end
end
if SEEN ~= '' and TOKEN == '' and (MODE == '' or refused < 0) then
  call('ZREMRANGEBYSCORE', RESENT, '-inf', I.now_ms)
  call('ZADD', RESENT, I.text(UNTIL_MS), ID)
  I.resent = math.max(I.resent, UNTIL_MS)
  call('PEXPIREAT', RESENT, I.text(I.resent + 1))
end
I.save()
if refused < 0 then
  call('SPUBLISH', BUS, 'd ' .. version_text .. ' ' .. ORIGIN .. ' ' .. KEY)
  return {refused, version}
end
if number then return {2, version, number} end
return {1, version, I.evicted}
