-- FRAGMENT index: the only writer of a cache's indexes. Included after an operation has named its KEYS: META SIZE
-- EXP NEW HOT WARM COLD GHOST TRASH.
--
-- A resident entry has one field in SIZE (its membership: hits * 10^10 + bytes), one member in exactly one of HOT,
-- WARM, COLD, NEW (score: clock of last touch * 16 + frequency 0..15) and, if it expires, one in EXP (ms). The
-- values lie beside, at <tag>e:<key>; the fragment computes those names, the bus's and those of cleared generations,
-- <tag>trash:<version>.
--
-- The clock counts 10 us, follows TIME, never repeats and never runs back: it orders touches, versions and
-- evictions. A frequency is halved once for each halving (one per 10 * room accesses) since it was written. The
-- clocks of the last four halvings lie in META, and the halving is done when a score is read, so that ageing
-- rewrites nothing.
--
-- Policy lru: newcomers enter cold, a read moves an entry up one tier, a full tier moves its oldest down, the oldest
-- of the lowest leaves. Policy tinylfu (Einziger, Friedman, Manes, "TinyLFU", 2017): newcomers wait in NEW, a window
-- of about 1 %; when the cache is full, the less frequent of the window's oldest and cold's oldest leaves. GHOST
-- remembers the frequency of twice as many evicted keys as there are residents. When newcomers are missed soon after
-- they left, the window widens, up to the whole cache, which is then an LRU; when the end of cold is read, it narrows.
-- Where popularity drifts that keeps within 4 points of an LRU, where a window of fixed size falls by 25 and more.
--
-- All state hangs on one table and functions capture nothing else: a script builds its closures on every call, and
-- Lua 5.1 pays for each captured local (measured: 14 us against 4). Numbers are written as '%d': Redis 7.0 prints
-- them with %.17g. The chunk ends early with {0} when the cache has no settings, and with an error before anything
-- was written when a key is not what it should be.
local I
do
  local call, number = redis.call, tonumber
  local m = call('HMGET', META, 'settings', 'clock', 'bytes', 'next', 'trash', 'resent', 'removed', 'evicted')
  if not m[1] then return {0} end
  local policy, hot, warm, cold, bytes, hot_ms, warm_ms, cold_ms =
    string.match(m[1], '^(%a+) room (%d+)/(%d+)/(%d+) bytes (%d+) ttl (%d+)/(%d+)/(%d+)$')
  local clock, held = number(m[2] or 0), number(m[3] or 0)
  if not policy or not clock or not held then
    return redis.error_reply('CORRUPT ' .. META .. ' settings, clock or bytes that are no numbers')
  end
  local lfu = policy == 'tinylfu'
  hot, warm, cold = number(hot), number(warm), number(cold)
  -- a first read of every key that may be written: one of the wrong type is refused here
  local n, newcomers, ageing = call('HLEN', SIZE), nil, nil
  if hot > 0 then call('ZCARD', HOT) end
  if warm > 0 then call('ZCARD', WARM) end
  call('ZCARD', COLD)
  if lfu then
    ageing = call('HMGET', META, 'accesses', 'grow', 'halvings')
    newcomers = call('ZCARD', NEW)
    call('ZCARD', GHOST)
  end
  local next_ms, heaps = number(m[4] or nil), number(m[5] or 0)
  if next_ms then call('ZCARD', EXP) end
  if heaps > 0 then call('LLEN', TRASH) end
  local time = call('TIME')
  I = {                                  -- all at once: a table that grows is hashed anew each time it doubles
    call = call, meta = META, size = SIZE, exp = EXP, ghost = GHOST, trash = TRASH,
    tier = {HOT, WARM, COLD, NEW}, prefix = string.sub(META, 1, -5) .. 'e:',
    HITS = 1e10,            -- one hit, in the number a SIZE field holds
    MOST = 9e15,            -- beyond, a double is not exact: a hit count stops at 900,000
    MAX_EVICTIONS = 512,    -- in one call
    lfu = lfu, room = {hot, warm, cold}, total = hot + warm + cold, top = hot > 0 and 1 or warm > 0 and 2 or 3,
    max_bytes = number(bytes), ttl_ms = {hot_ms, warm_ms, cold_ms, cold_ms},
    expires = cold_ms ~= '0' or hot_ms ~= '0' or warm_ms ~= '0',
    n = n, newcomers = newcomers, bytes = held,
    next = next_ms,         -- no later than the first expiry; nil if there is none, and EXP is empty
    heaps = heaps, resent = number(m[6] or 0),
    removed = m[7],         -- as it is stored until something is removed
    now_ms = time[1] * 1000 + math.floor(time[2] / 1000),
    clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock),
    accesses = lfu and number(ageing[1] or 0), grow = lfu and number(ageing[2] or 0),
    halvings = lfu and (ageing[3] or '0 0 0 0'),
    halved = false, tail = false, served = false, counters = false, writer = false, promoted = false,
    dead = {}, evicted = 0, expired = 0, stored = m, ageing = ageing,
  }
end

function I.text(number) return string.format('%d', number) end
-- The part of the cache that `share` and `step` speak of: all of it, or what there is of it.
function I.share(part) return math.floor(math.min(I.total, I.n) * part) end
function I.step() return math.max(1, math.min(I.total, I.n) * 0.015) end

-- Frequency now of an entry whose score was written at clock `at` with frequency f.
function I.aged(f, at)
  if f == 0 then return 0 end
  if not I.halved then I.halved = tonumber(string.match(I.halvings, '^%d+')) end
  if at >= I.halved then return f end                                  -- the usual case
  for halving in string.gmatch(I.halvings, '%d+') do
    if f == 0 or at >= tonumber(halving) then break end
    f = math.floor(f / 2)
  end
  return f
end
function I.frequency(score) return I.aged(score % 16, math.floor(score / 16)) end

-- Let the clock tick for n accesses to one key.
function I.tick(n)
  I.clock = I.clock + 1
  if not I.lfu then return end
  I.accesses = I.accesses + n
  if I.accesses >= 10 * (I.total < 1e9 and I.total or math.max(100, I.n)) then
    I.accesses = 0
    I.halvings = I.text(I.clock) .. ' ' .. string.match(I.halvings, '%d+ %d+ %d+')
    I.halved = I.clock
  end
end

-- Tier and score of a resident, or nothing.
function I.find(key)
  for i = I.top, I.lfu and 4 or 3 do
    if i == 4 or I.room[i] > 0 then
      local score = I.call('ZSCORE', I.tier[i], key)
      if score then return i, tonumber(score) end
    end
  end
end

-- Where each of the keys is: tiers and scores by position. One command a tier, none for the plain LRU.
function I.locate(keys)
  local sizes, where, scores, rest = I.call('HMGET', I.size, unpack(keys)), {}, {}, {}
  for p = 1, #keys do if sizes[p] then rest[#rest + 1] = p end end
  if not I.lfu and I.top == 3 then
    for _, p in ipairs(rest) do where[p] = 3 end
    return sizes, where, scores
  end
  for i = I.top, I.lfu and 4 or 3 do
    if #rest > 0 and (i == 4 or I.room[i] > 0) then
      local names, left = {}, {}
      for n, p in ipairs(rest) do names[n] = keys[p] end
      for n, score in ipairs(I.call('ZMSCORE', I.tier[i], unpack(names))) do
        if score then where[rest[n]], scores[rest[n]] = i, tonumber(score) else left[#left + 1] = rest[n] end
      end
      rest = left
    end
  end
  return sizes, where, scores
end

-- Note reads of distinct keys, oldest first: recency, frequency, promotion by one tier a read. About ten commands
-- whatever the length. Reads of keys that are gone meanwhile are booked under cold. Returns how many keys were found.
function I.touch(keys, counts)
  local sizes, where, scores = I.locate(keys)
  if I.lfu and I.grow > 0 then                                         -- where the last 7.5 % of cold end
    local rank = I.share(0.075)
    I.tail = tonumber(I.call('ZRANGE', I.tier[3], rank, rank, 'WITHSCORES')[2]) or math.huge
  end
  local leave, enter, hits, found = {{}, {}, {}, {}}, {{}, {}, {}, {}}, {}, 0
  I.served = I.served or {0, 0, 0, 0}
  for p = 1, #keys do
    local from, n, f = where[p], counts[p], 0
    if from then
      I.tick(n)
      local to = (from == 4 or from <= I.top) and from or math.max(I.top, from - n)
      while to < 3 and I.room[to] == 0 do to = to - 1 end              -- warm may be unused between hot and cold
      if I.lfu then
        f = math.min(15, I.frequency(scores[p]) + n)
        -- a hit at the very end of cold: the window took too much
        if from == 3 and I.grow > 0 and scores[p] <= I.tail then I.grow = math.max(0, I.grow - I.step()) end
      end
      if to ~= from then
        leave[from][#leave[from] + 1] = keys[p]
        I.promoted = true
      end
      local e = enter[to]
      e[#e + 1] = I.text(I.clock * 16 + f); e[#e + 1] = keys[p]
      local size = (tonumber(sizes[p]) or 0) + n * I.HITS
      if size < I.MOST then hits[#hits + 1] = keys[p]; hits[#hits + 1] = I.text(size) end
      found = found + 1
    end
    I.served[from or 3] = I.served[from or 3] + n
  end
  if found > 0 then
    for i = 1, 4 do
      if #leave[i] > 0 then I.call('ZREM', I.tier[i], unpack(leave[i])) end
      if #enter[i] > 0 then I.call('ZADD', I.tier[i], unpack(enter[i])) end
    end
    if #hits > 0 then I.call('HSET', I.size, unpack(hits)) end
  end
  return found
end

-- Take in what a process reports of reads it served without a script: once, however often it is delivered.
function I.report(writer, seq, keys, counts, counters)
  local field = 'w:' .. writer
  local last = tonumber(string.match(I.call('HGET', I.meta, field) or '0', '^%d+'))
  if last >= seq then return end
  I.writer = {field, seq .. ' ' .. I.text(I.now_ms)}
  I.counters = counters
  if #keys > 0 then I.touch(keys, counts) end
end

-- Forgetting is noted by `drop` and written by `bury`, once for all that a call forgets.
function I.drop(key)
  I.dead[#I.dead + 1] = key
  I.n = I.n - 1
  if I.max_bytes > 0 then I.bytes = I.bytes - (tonumber(I.call('HGET', I.size, key) or nil) or 0) % I.HITS end
end
function I.bury(lease)
  local dead, values = I.dead, {lease}
  if #dead > 0 then
    if I.max_bytes == 0 then
      local sizes = I.call('HMGET', I.size, unpack(dead))
      for i = 1, #dead do I.bytes = I.bytes - (tonumber(sizes[i] or nil) or 0) % I.HITS end
    end
    I.call('HDEL', I.size, unpack(dead))
    if I.next then I.call('ZREM', I.exp, unpack(dead)) end
    for i = 1, #dead do values[#values + 1] = I.prefix .. dead[i] end
    I.dead = {}
    I.removed = I.clock
  end
  if #values > 0 then I.call('UNLINK', unpack(values)) end
end
-- Forget a resident, from whatever tier.
function I.remove(key)
  for i = I.lfu and 4 or 3, I.top, -1 do
    if (i == 4 or I.room[i] > 0) and I.call('ZREM', I.tier[i], key) == 1 then
      if i == 4 then I.newcomers = I.newcomers - 1 end
      break
    end
  end
  I.drop(key)
end
function I.evict(i, key, score)
  I.call('ZREM', I.tier[i], key)
  if i == 4 then I.newcomers = I.newcomers - 1 end
  I.drop(key)
  I.evicted = I.evicted + 1
  if I.lfu then
    I.call('ZADD', I.ghost, I.text(I.clock * 16 + (i == 4 and 8 or 0) + math.min(7, I.frequency(score))), key)
  end
end
-- The oldest of a tier with its score as number and as text; never `keep`, which is the oldest only where it is alone.
function I.oldest(i, keep)
  local v = I.call('ZRANGE', I.tier[i], 0, 0, 'WITHSCORES')
  if v[1] and v[1] ~= keep then return v[1], tonumber(v[2]), v[2] end
end
-- A newcomer becomes an ordinary entry.
function I.settle(key, score)
  I.call('ZREM', I.tier[4], key)
  I.call('ZADD', I.tier[3], score, key)
  I.newcomers = I.newcomers - 1
end

-- Bring hot, warm, the window and the whole within their rooms. `keep` is the entry just written, which stays.
function I.balance(keep)
  local room = I.room
  for i = I.top, I.promoted and 2 or 0 do
    local over = room[i] > 0 and math.min(I.MAX_EVICTIONS, I.call('ZCARD', I.tier[i]) - room[i]) or 0
    if over > 0 then                     -- demoted with the score it has: each tier stays in the order of last touch
      local v, args = I.call('ZRANGE', I.tier[i], 0, over - 1, 'WITHSCORES'), {}
      for j = 1, #v, 2 do args[j], args[j + 1] = v[j + 1], v[j] end
      I.call('ZREMRANGEBYRANK', I.tier[i], 0, over - 1)
      I.call('ZADD', I.tier[(i == 1 and room[2] > 0) and 2 or 3], unpack(args))
    end
  end
  for _ = 1, I.MAX_EVICTIONS do
    local full = I.n > I.total or (I.max_bytes > 0 and I.bytes > I.max_bytes)
    if not I.lfu and I.top == 3 then     -- plain LRU
      if not full or (keep and I.n < 2) then break end
      local oldest = I.call('ZPOPMIN', I.tier[3])[1]
      if not oldest then break end
      I.evicted = I.evicted + 1
      I.drop(oldest)
    else
      local wide = false
      if I.lfu then
        local base = math.max(1, math.floor(math.min(I.total, I.n) * 0.01 + 0.5))
        wide = I.newcomers > math.min(base + math.floor(I.grow), math.max(1, I.total - 1))
      end
      if full then
        local i, victim, score, young, young_score, young_text = 4
        repeat                           -- the oldest of the coldest tier that has one
          i = i - 1
          if room[i] > 0 then victim, score = I.oldest(i, keep) end
        until victim or i == I.top
        if wide or (I.lfu and not victim) then young, young_score, young_text = I.oldest(4, keep) end
        if young and victim then         -- admission: the less frequent of the two leaves
          if I.frequency(young_score) > I.frequency(score) then
            I.evict(i, victim, score)
            I.settle(young, young_text)
          else
            I.evict(4, young, young_score)
          end
        elseif victim then I.evict(i, victim, score)
        elseif young then I.evict(4, young, young_score)
        else break end
      elseif wide then
        local young, _, text = I.oldest(4)
        I.settle(young, text)
      else break end
    end
  end
  -- twice as many ghosts as residents, trimmed now and then
  if I.lfu and I.evicted > 0 and (I.evicted > 4 or I.accesses % 16 == 0) then
    I.call('ZREMRANGEBYRANK', I.ghost, 0, -1 - math.max(16, I.share(2)))
  end
end

-- Forget up to n entries whose expiry has passed. Returns how many.
function I.reap(n)
  if not I.next or I.now_ms < I.next then return 0 end
  local gone = I.call('ZRANGEBYSCORE', I.exp, '-inf', I.now_ms, 'LIMIT', 0, n)
  for j = 1, #gone do I.remove(gone[j]) end
  I.bury()
  I.expired = I.expired + #gone
  I.next = tonumber(I.call('ZRANGE', I.exp, 0, 0, 'WITHSCORES')[2])
  return #gone
end
-- Free up to n values of cleared generations. Returns how many were looked at.
function I.empty_trash(n)
  local generation = I.call('LINDEX', I.trash, 0)
  if not generation then I.heaps = 0; return 0 end
  local heap = I.trash .. ':' .. generation
  local keys = redis.pcall('HRANDFIELD', heap, n)
  if keys.err then                                                     -- no heap of ours: what lay in it is not known
    I.call('UNLINK', heap)
    keys = {}
  end
  if #keys > 0 then
    local live, gone = I.call('HMGET', I.size, unpack(keys)), {}
    for i, key in ipairs(keys) do if not live[i] then gone[#gone + 1] = I.prefix .. key end end
    if #gone > 0 then I.call('UNLINK', unpack(gone)) end
    I.call('HDEL', heap, unpack(keys))
  end
  if #keys < n then I.call('LPOP', I.trash); I.heaps = I.heaps - 1 end
  return #keys
end

-- Write down what has changed in META. Last of all: everything that frees comes before.
function I.save()
  local stored, evicted, removed = I.stored, I.stored[8] or '0', I.removed or '0'
  if I.evicted > 0 then evicted = I.text((tonumber(evicted) or 0) + I.evicted) end
  if removed ~= stored[7] then removed = I.text(removed) end
  local f = {'clock', I.text(I.clock), 'bytes', I.text(I.bytes), 'evicted', evicted, 'removed', removed}
  local function note(name, value) f[#f + 1] = name; f[#f + 1] = value end
  if I.next ~= tonumber(stored[4] or nil) then note('next', I.next and I.text(I.next) or '') end
  if I.heaps ~= tonumber(stored[5] or 0) then note('trash', I.heaps) end
  if I.resent ~= tonumber(stored[6] or 0) then note('resent', I.text(I.resent)) end
  if I.lfu then
    note('accesses', I.text(I.accesses))
    if I.grow ~= tonumber(I.ageing[2] or 0) then note('grow', I.grow) end
    if I.halvings ~= (I.ageing[3] or '0 0 0 0') then note('halvings', I.halvings) end
  end
  if I.writer then note(I.writer[1], I.writer[2]) end
  if I.served or I.counters or I.expired > 0 then
    local s, c = I.served or {0, 0, 0, 0}, I.counters or {0, 0, 0}
    local names = {'hot', 'warm', 'cold', 'expired', 'misses', 'saved_ms', 'corrupt'}
    local add, have = {s[1], s[2], s[3] + s[4], I.expired, c[1], c[2], c[3]}, I.call('HMGET', I.meta, unpack(names))
    for i, name in ipairs(names) do
      if add[i] > 0 then note(name, I.text((tonumber(have[i] or nil) or 0) + add[i])) end
    end
  end
  I.call('HSET', I.meta, unpack(f))
end
-- END FRAGMENT
