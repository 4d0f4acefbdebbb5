-- The indexes of a cache, and the functions that update them.
-- <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
--
-- An entry is resident if the hash SIZE has a field for it. The field holds the entry's hits and bytes (see pack_size).
-- A resident is a member of exactly one of the sorted sets HOT, WARM, COLD and NEW. Its score there combines two
-- numbers: the clock of its last read or write, and its frequency (see pack_score). The value of a resident is stored
-- at <tag>:e:<key>. This file computes the key names <tag>:e:<key> and <tag>:marks from META. cleared.lua and clear.lua
-- compute <tag>:deferred:<version> from DEFERRED.
--
-- The server expires the value of an entry. No index is ordered by expiry, because such an index would take a third of
-- the memory of all indexes. An expired entry therefore stays resident until a write finds that the entry has no value
-- (see expiry.lua). In a cache of at most 32 entries, the next write finds it. In a larger cache, every 16th write on
-- average examines 16 residents. If a write finds expired residents, the next write also examines 16. So on average, an
-- expired entry is removed within N writes in a cache of N residents. If the share of expired residents is p, a write
-- removes on average about 16 * p / (1 + 15 * (1 - p)^16) entries. At p = 1 / 7, a write removes one entry, as many as
-- it adds. So even if every entry has a TTL, at most about a seventh of the residents are expired.
--
-- The clock counts units of 10 us and follows the server's TIME, but it never repeats and never runs backwards. It
-- orders reads, versions and evictions. Frequencies age: every 16 * capacity accesses, all frequencies are halved.
-- A halving changes no stored score: META holds the clock of each of the last four halvings. When a script reads a
-- score, it halves the frequency once for each halving since the score was written.
--
-- Policy lru: a new entry starts in cold. A read promotes an entry by one tier. A full tier demotes its oldest entry.
-- The oldest entry of the lowest tier is evicted.
--
-- Policy tinylfu (Einziger, Friedman, Manes, "TinyLFU", 2017): a new entry starts in NEW, a window of about 1 % of the
-- cache. When the cache and the window are full, the oldest entry of the window is compared with the oldest entry of
-- cold, and the one with the lower frequency is evicted. GHOST keeps the frequencies of evicted keys. It is trimmed to
-- twice as many members as there are residents.
--
-- Two signals change the size of the window. If keys that were evicted from the window are soon stored again, the
-- window grows. If it fills the whole cache, the cache works as an LRU. If entries at the old end of cold (see
-- reads.lua) are read, the window shrinks. Each change of the window evicts or admits entries without a comparison,
-- which costs hits. Therefore the size of a change is proportional to the square of `trend`, the moving average of the
-- signals. So the window moves far only while most signals have the same direction. If the signals balance, the window
-- stays.
--
-- The signals measure only the gain of a small change. If a program loops over slightly more keys than the cache can
-- hold, the signals can move the window through sizes at which the cache has far fewer hits. Therefore the hit ratio of
-- each period (see I.adapt) is compared with the hit ratio of an earlier period. If the window has moved and the hit
-- ratio has clearly fallen, the window returns to its earlier size and keeps this size for some periods. If the hit
-- ratio stays low even so, the window was not the cause. In this case, the window may move again after two periods.
--
-- In the tests in which the popularity of keys drifts, the hit ratio is at most 4 percentage points lower than with an
-- LRU. With a window of fixed size, it would be at least 25 points lower than with an LRU.
--
-- All state is in one table, and the functions capture only this table. A script builds its closures on every call, and
-- Lua 5.1 needs time for each captured local (measured per call: 14 us with many locals, 4 us with one). To save time,
-- the functions are built only after the settings have been found. Numbers are converted to text with '%d', because
-- Redis 7.0 would convert a number in a command with %.17g.

-- Needs corrupt.lua and whole_number.lua. Most writes do not need the functions in three other files: reads.lua records
-- reads, expiry.lua deletes expired entries, and cleared.lua deletes cleared values.

local MAX_HITS = 9e15  -- up to this number, a double holds each whole number exactly

-- Read the state of the indexes, and write nothing. Returns a table of the state and the functions. If the cache cannot
-- be used, returns nil and the reply that the script must return. The reply is {0} if the cache has no settings or its
-- entries are being moved to another layout. The reply is an error if a key holds unexpected data. closed: true in the
-- scripts that empty a shard after fence.lua has closed it. key: if given, the score of this key in GHOST is read.
local function open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED, closed, key)
  local call, number = redis.call, tonumber
  local m = call('HMGET', META, 'settings', 'clock', 'bytes', 'next', 'deferred', 'resent', 'removed', 'evicted',
    'moving', 'scan', 'accesses', 'grow', 'halvings', 'climb')
  if not m[1] then return nil, {0} end
  local text = closed and string.match(m[1], '^.- ttl [%d/]+') or m[1]
  local policy, hot, warm, cold, bytes, hot_ms, warm_ms, cold_ms =
    string.match(text, '^(%a+) capacity (%d+)/(%d+)/(%d+) bytes (%d+) ttl (%d+)/(%d+)/(%d+)$')
  -- A script must not fail after its first write. So every field that a script needs is checked here.
  local is_short = policy and #hot <= 15 and #warm <= 15 and #cold <= 15 and #bytes <= 16
    and #hot_ms <= 15 and #warm_ms <= 15 and #cold_ms <= 15
  if not is_short then
    -- Settings of another layout are no fault. The caller does not know yet that the layout was changed, or that the
    -- entries are being moved to a new layout.
    if string.match(m[1], '%d shards %d+') or string.match(m[1], '%d layout %d+') or string.match(m[1], '%d to %d+$')
      or string.match(m[1], ' closed$') then return nil, {0} end
    return nil, corrupt(META, 'settings of another form')
  end
  local clock, held = whole_number(m[2], 0), whole_number(m[3], 0)
  local next_ms, deferred_count = m[4] and m[4] ~= '' and whole_number(m[4]), whole_number(m[5], 0)
  local resent = whole_number(m[6], 0)
  local is_whole = clock and held and deferred_count and resent and whole_number(m[7], 0)
  if not is_whole or (not next_ms and m[4] and m[4] ~= '') then
    return nil, corrupt(META, 'clock, bytes, next, deferred, resent or removed that is no whole number')
  end
  -- While entries move to this shard from another layout, the field `moving` holds two numbers: how many entries and
  -- how many bytes of this shard's limits are still reserved for the other layout.
  hot, warm, cold = number(hot), number(warm), number(cold)
  local total, max_bytes, marks = hot + warm + cold, number(bytes), false
  if m[9] and m[9] ~= 'done' and not closed then
    local kept, kept_bytes = string.match(m[9], '^(%d+) (%d+)$')
    kept, kept_bytes = whole_number(kept), whole_number(kept_bytes)
    if not kept or not kept_bytes then return nil, corrupt(META, 'moving that is not two whole numbers') end
    marks = string.sub(META, 1, -5) .. 'marks'
    call('HLEN', marks)
    total = math.max(1, total - kept)
    if max_bytes > 0 then max_bytes = math.max(1, max_bytes - kept_bytes) end
  end
  local lfu = policy == 'tinylfu'
  -- Read each key that may be written later. If a key has the wrong type, this read fails before anything is written.
  local n, newcomers, remembered, accesses, grow = call('HLEN', SIZE), nil, nil, nil, nil
  if hot > 0 then call('ZCARD', HOT) end
  if warm > 0 then call('ZCARD', WARM) end
  call('ZCARD', COLD)
  if lfu then
    accesses, grow = whole_number(m[11], 0), number(m[12] or 0)
    local is_number = grow and grow >= 0 and grow < 9e15
    if not accesses or not is_number or not string.match(m[13] or '0 0 0 0', '^%d+ %d+ %d+ %d+$') then
      return nil, corrupt(META, 'accesses, grow or halvings of another form')
    end
    newcomers = call('ZCARD', NEW)
    if key then remembered = call('ZSCORE', GHOST, key) else call('ZCARD', GHOST) end
  end
  if deferred_count > 0 then call('LLEN', DEFERRED) end
  local time = call('TIME')
  -- The table is built in one expression, because a growing table is rehashed at each doubling. The expression has more
  -- than 32 fields, so it makes a table with space for 64. In the usual calls, the table must have at most 64 fields,
  -- including the functions that are added to it. The next doubling would cost 28,000 instructions, 6 % of a put.
  -- Therefore some fields are added only in the rare calls that need them:
  --   climb                         how the window moves, see adapt
  --   tail                          see record_reads in reads.lua
  --   served, counters, writer      statistics, and the seq of the recorded report; `save` writes them
  local I = {
    call = call, meta = META, size = SIZE, ghost = GHOST, deferred = DEFERRED,
    tier = {HOT, WARM, COLD, NEW}, prefix = string.sub(META, 1, -5) .. 'e:',
    lfu = lfu, capacity = {hot, warm, cold}, total = total, top = hot > 0 and 1 or warm > 0 and 2 or 3,
    max_bytes = max_bytes, ttl_ms = {hot_ms, warm_ms, cold_ms, cold_ms},
    n = n, newcomers = newcomers, bytes = held,
    remembered = remembered,                           -- score of `key` in GHOST, as text; false if GHOST lacks the key
    next = next_ms or nil,  -- no entry expires before this time, ms; nil if no entry has an expiry
    scan = m[10],           -- HSCAN cursor of the search for expired entries; "<cursor> +" if the last search found any
    deferred_count = deferred_count, resent = resent,
    removed = m[7],         -- clock of the last removal: the stored text, or a number if this call removes something
    now_ms = time[1] * 1000 + math.floor(time[2] / 1000),
    clock = math.max(time[1] * 100000 + math.floor(time[2] / 10), clock),
    marks = marks,          -- key of the marks, see expect.lua; false if no entries move here
    accesses = accesses, grow = grow,  -- I.accesses packs two counts of the current period: hits * 10^8 + accesses
    halvings = lfu and (m[13] or '0 0 0 0'),
    promoted = false,       -- whether an entry may have entered hot or warm
    halved = false,         -- see I.aged
    dead = {}, evicted = 0, expired = 0, stored = m,
  }

  function I.text(whole) return string.format('%d', whole) end

  -- A field of SIZE and a score each hold two numbers. A field of SIZE is hits * 10^10 + bytes. It may exceed 2^53, so
  -- its digits are handled as text. A score is clock * 16 + frequency. Only the four functions below and their
  -- counterparts in cache/entry_format.py pack and unpack these numbers. In a score of GHOST, the frequency is at most
  -- 7. If the entry was evicted from the window, 8 is added.
  function I.pack_size(hits, size)
    if hits > 0 then return string.format('%d%010d', hits, size) end
    return string.format('%d', size)
  end
  function I.unpack_size(packed)
    local whole = whole_number(packed, 0)
    if whole then
      local size = whole % 1e10
      return (whole - size) / 1e10, size
    end
    local hits, size = string.match(packed, '^(%d+)(%d%d%d%d%d%d%d%d%d%d)$')
    return whole_number(hits) or 0, whole_number(size) or 0            -- 0 if another program has changed it
  end
  function I.pack_score(at, frequency) return at * 16 + frequency end

  if lfu then                            -- only tinylfu needs these functions; creating each takes about 0.2 us
    function I.unpack_score(score)
      if not (score >= 0 and score < 1.4e17) then return 0, 0 end      -- another program has changed it
      return math.floor(score / 16), score % 16
    end

    -- Return `part` * min(capacity, number of entries), rounded down.
    function I.share(part) return math.floor(math.min(I.total, I.n) * part) end

    -- Adapt the window. Direction 1 is a signal to widen it, -1 a signal to narrow it. Direction 0 ends a period, which
    -- has about 4 * capacity accesses. META's field climb holds five numbers:
    --   trend   the moving average of the signals
    --   rest    the number of periods for which signals are still ignored
    --   ratio   the hit ratio of an earlier period, with which later periods are compared. A negative value means that
    --           there is no such ratio yet. -3: nothing was evicted yet. -2: the cache became full in the last
    --           completed period. -1: the cache became full one period earlier. Neither the period in which the cache
    --           becomes full nor the next one gives a ratio, because the entries are newer than in later periods
    --   grow    I.grow when `ratio` was stored. The window has 1 % of the cache, plus I.grow entries
    --   age     the number of periods since the last halving of the frequencies
    function I.adapt(direction)
      local c, entries = I.climb, math.min(I.total, I.n)
      if not c then                      -- read the field; if it is missing or malformed, default values apply
        local trend, rest, ratio, grow, age =
          string.match(I.stored[14] or '', '^(%-?%d[%d.e-]*) (%d) (%-?%d[%d.e-]*) (%d[%d.e+-]*) (%d)$')
        c = {trend = tonumber(trend or 0) or 0, rest = tonumber(rest or 0), ratio = tonumber(ratio or -3) or -3,
          grow = tonumber(grow or 0) or 0, age = tonumber(age or 0)}
        I.climb = c
      end
      local max = math.max(0, I.total - 2)
      if direction ~= 0 then
        if c.rest > 0 then return end
        c.trend = math.max(-1, math.min(1, c.trend + (direction - c.trend) / 20))
        local agreement = c.trend * direction
        if agreement > 0 then            -- a step is at most 3 % of the cache
          I.grow = math.max(0, math.min(max, I.grow + direction * entries * 0.03 * agreement * agreement))
        end
        return
      end
      local accesses = I.accesses % 1e8
      local ratio = math.min(1, (I.accesses - accesses) / 1e8 / accesses)
      I.accesses = 0
      c.age = c.age + 1
      if c.age >= 4 then
        c.age = 0
        I.halvings = I.text(I.clock) .. ' ' .. string.match(I.halvings, '%d+ %d+ %d+')
        I.halved = I.clock
      end
      local chance = c.ratio > 0 and math.sqrt(2 * c.ratio * (1 - c.ratio) / accesses)
      local has_fallen = chance and ratio < c.ratio * 0.95 and ratio < c.ratio - 3 * chance
      if c.rest > 0 then
        c.rest = c.rest - 1
        -- c.rest is 7 at the end of the first period after the window has returned to its earlier size. The hit ratio
        -- of this period is not used: at its beginning, the cache still held the entries from before the return.
        if c.rest == 7 then return end
        if c.rest == 6 and has_fallen then c.rest = 0 end
      elseif I.call('ZCARD', I.ghost) == 0 then ratio = -3
      elseif c.ratio == -3 or c.ratio == -2 then ratio = c.ratio + 1
      elseif ratio < c.ratio and math.abs(I.grow - c.grow) > entries * 0.05 then
        if has_fallen then
          I.grow = math.min(max, c.grow)
          c.trend, c.rest = 0, 8
        end
        return                           -- keep the earlier, better ratio, so small losses of several periods add up
      end
      c.ratio, c.grow = ratio, I.grow
    end

    -- Return the current frequency of an entry whose score was written at clock `at` with frequency f.
    function I.aged(at, f)
      if f == 0 then return 0 end
      if not I.halved then I.halved = tonumber(string.match(I.halvings, '^%d+')) end
      if at >= I.halved then return f end                              -- the usual case
      for halving in string.gmatch(I.halvings, '%d+') do
        if f == 0 or at >= tonumber(halving) then break end
        f = math.floor(f / 2)
      end
      return f
    end
    function I.frequency(score) return I.aged(I.unpack_score(score)) end

    -- Move an entry from the window to cold.
    function I.admit(key, score)
      I.call('ZREM', I.tier[4], key)
      I.call('ZADD', I.tier[3], score, key)
      I.newcomers = I.newcomers - 1
    end
  end

  -- Advance the clock by one, and count n accesses to one key, of which `hits` were hits.
  function I.tick(n, hits)
    I.clock = I.clock + 1
    if not I.lfu then return end
    I.accesses = I.accesses + n + hits * 1e8
    local period = 4 * (I.total < 1e9 and I.total or math.max(100, I.n))
    if I.accesses % 1e8 >= math.min(2e7, period) then I.adapt(0) end
  end

  -- `drop` marks an entry for deletion. `delete_dropped` deletes all marked entries, and a lease if one is passed.
  function I.drop(key)
    I.dead[#I.dead + 1] = key
    I.n = I.n - 1
    if I.max_bytes > 0 then
      local _, size = I.unpack_size(I.call('HGET', I.size, key))
      I.bytes = I.bytes - size
    end
  end
  function I.delete_dropped(lease)
    local dead, values = I.dead, {lease}
    if #dead > 0 then
      if I.max_bytes == 0 then
        local sizes = I.call('HMGET', I.size, unpack(dead))
        for i = 1, #dead do
          local _, size = I.unpack_size(sizes[i])
          I.bytes = I.bytes - size
        end
      end
      I.call('HDEL', I.size, unpack(dead))
      for i = 1, #dead do values[#values + 1] = I.prefix .. dead[i] end
      I.dead = {}
      I.removed = I.clock
    end
    if #values > 0 then I.call('UNLINK', unpack(values)) end
  end
  -- Remove a resident from its tier, and mark it for deletion.
  function I.remove(key)
    for i = I.lfu and 4 or 3, I.top, -1 do
      if (i == 4 or I.capacity[i] > 0) and I.call('ZREM', I.tier[i], key) == 1 then
        if i == 4 then I.newcomers = I.newcomers - 1 end
        break
      end
    end
    I.drop(key)
  end
  if lfu or I.top < 3 then                 -- a plain LRU evicts without these functions
    function I.evict(i, key, score)
      I.call('ZREM', I.tier[i], key)
      if i == 4 then I.newcomers = I.newcomers - 1 end
      I.drop(key)
      I.evicted = I.evicted + 1
      if I.lfu then
        local remembered = (i == 4 and 8 or 0) + math.min(7, I.frequency(score))
        I.call('ZADD', I.ghost, I.text(I.pack_score(I.clock, remembered)), key)
      end
    end
    -- Return the oldest entry of a tier, and its score as a number and as text. The entry `keep` was just written, so
    -- it is the newest of its tier. If it is also the oldest, the tier has no other entry, and nothing is returned.
    function I.oldest(i, keep)
      local v = I.call('ZRANGE', I.tier[i], 0, 0, 'WITHSCORES')
      if v[1] and v[1] ~= keep then return v[1], tonumber(v[2]), v[2] end
    end
  end
  -- Demote and evict entries until hot, warm, the window and the whole cache are within their capacities. `keep` is the
  -- entry just written; it is not evicted.
  function I.balance(keep)
    local capacity, MAX_EVICTIONS = I.capacity, 512                    -- max evictions, and max moves out of each tier
    for i = I.top, I.promoted and 2 or 0 do
      local over = capacity[i] > 0 and math.min(MAX_EVICTIONS, I.call('ZCARD', I.tier[i]) - capacity[i]) or 0
      if over > 0 then                   -- entries keep their scores, so each tier stays ordered by last access
        local v, args = I.call('ZRANGE', I.tier[i], 0, over - 1, 'WITHSCORES'), {}
        for j = 1, #v, 2 do args[j], args[j + 1] = v[j + 1], v[j] end
        I.call('ZREMRANGEBYRANK', I.tier[i], 0, over - 1)
        I.call('ZADD', I.tier[(i == 1 and capacity[2] > 0) and 2 or 3], unpack(args))
      end
    end
    for _ = 1, MAX_EVICTIONS do
      local full = I.n > I.total or (I.max_bytes > 0 and I.bytes > I.max_bytes)
      if not I.lfu and I.top == 3 then   -- plain LRU
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
          repeat                         -- find the oldest entry of the coldest tier that has entries
            i = i - 1
            if capacity[i] > 0 then victim, score = I.oldest(i, keep) end
          until victim or i == I.top
          if wide or (I.lfu and not victim) then young, young_score, young_text = I.oldest(4, keep) end
          if young and victim then       -- admission: the less frequent of the two is evicted
            if I.frequency(young_score) > I.frequency(score) then
              I.evict(i, victim, score)
              I.admit(young, young_text)
            else
              I.evict(4, young, young_score)
            end
          elseif victim then I.evict(i, victim, score)
          elseif young then I.evict(4, young, young_score)
          else break end
        elseif wide then
          local young, _, text = I.oldest(4)
          I.admit(young, text)
        else break end
      end
    end
    -- Trim GHOST to twice as many keys as there are residents, or to 16 keys if that is more. A call that has evicted
    -- more than 4 entries trims GHOST. A call with 1 to 4 evictions trims it only at every 16th access.
    if I.lfu and I.evicted > 0 and (I.evicted > 4 or I.accesses % 16 == 0) then
      I.call('ZREMRANGEBYRANK', I.ghost, 0, -1 - math.max(16, I.share(2)))
    end
  end

  -- Write the changed state to META. Call this function last, after all commands that free memory.
  function I.save()
    local stored = I.stored
    local f = {'clock', I.text(I.clock), 'bytes', I.text(math.max(0, I.bytes))}
    local function note(name, value) f[#f + 1] = name; f[#f + 1] = value end
    if I.removed ~= stored[7] then note('removed', I.text(I.removed)) end
    -- If another program has written text into a counter, leave the counter unchanged. Only the statistics read the
    -- counters, and they report the fault.
    local evicted = I.evicted > 0 and whole_number(stored[8], 0)
    if evicted then note('evicted', I.text(evicted + I.evicted)) end
    if I.scan ~= stored[10] then note('scan', I.scan) end
    if I.next ~= tonumber(stored[4] or nil) then note('next', I.next and I.text(I.next) or '') end
    if I.deferred_count ~= tonumber(stored[5] or 0) then note('deferred', I.deferred_count) end
    if I.resent ~= tonumber(stored[6] or 0) then note('resent', I.text(I.resent)) end
    if I.lfu then
      note('accesses', I.text(I.accesses))
      if I.grow ~= tonumber(stored[12] or 0) then note('grow', I.grow) end
      if I.halvings ~= (stored[13] or '0 0 0 0') then note('halvings', I.halvings) end
      local c = I.climb
      if c then note('climb', string.format('%.17g %d %.17g %.17g %d', c.trend, c.rest, c.ratio, c.grow, c.age)) end
    end
    if I.writer then note(I.writer[1], I.writer[2]) end
    if I.served or I.counters or I.expired > 0 then
      local s, c = I.served or {0, 0, 0, 0}, I.counters or {0, 0, 0}
      local names = {'hot', 'warm', 'cold', 'expired', 'misses', 'saved_ms', 'corrupt'}
      local add, have = {s[1], s[2], s[3] + s[4], I.expired, c[1], c[2], c[3]}, I.call('HMGET', I.meta, unpack(names))
      for i, name in ipairs(names) do
        local before = add[i] > 0 and whole_number(have[i], 0)
        if before then note(name, I.text(before + add[i])) end
      end
    end
    I.call('HSET', I.meta, unpack(f))
  end

  return I
end
