-- These functions record reads. They are added to I, the state of the indexes; see index.lua. They are not in index.lua
-- itself, because most puts do not need them, and creating each function takes about 0.2 us.

-- Return three tables: the fields of SIZE, the tiers and the scores of the keys. The index in each table is the
-- position of the key in `keys`. Sends one command per tier to find the scores. In a plain LRU, all entries are in cold
-- and no scores are needed, so these commands are not sent.
function I.locate(keys)
  local sizes, tiers, scores, rest = I.call('HMGET', I.size, unpack(keys)), {}, {}, {}
  for p = 1, #keys do if sizes[p] then rest[#rest + 1] = p end end
  if not I.lfu and I.top == 3 then
    for _, p in ipairs(rest) do tiers[p] = 3 end
    return sizes, tiers, scores
  end
  for i = I.top, I.lfu and 4 or 3 do
    if #rest > 0 and (i == 4 or I.capacity[i] > 0) then
      local names, left = {}, {}
      for j, p in ipairs(rest) do names[j] = keys[p] end
      for j, score in ipairs(I.call('ZMSCORE', I.tier[i], unpack(names))) do
        if score then tiers[rest[j]], scores[rest[j]] = i, tonumber(score) else left[#left + 1] = rest[j] end
      end
      rest = left
    end
  end
  return sizes, tiers, scores
end

-- Record reads of distinct keys, oldest read first. Updates the recency and the frequency of each key, and promotes the
-- key by one tier per read. Sends about ten commands for any number of keys. Reads of keys that no longer exist count
-- as hits of cold.
function I.record_reads(keys, counts)
  local sizes, tiers, scores = I.locate(keys)
  -- The old end of cold consists of the entries of cold that were used longest ago. Its size is a tenth of the cache.
  -- I.tail is the highest score in the old end. If cold is smaller than a tenth of the cache, all of cold counts as the
  -- old end.
  if I.lfu and I.grow >= 1 then
    local rank = I.share(0.1)
    I.tail = tonumber(I.call('ZRANGE', I.tier[3], rank, rank, 'WITHSCORES')[2]) or math.huge
  end
  local leave, enter, hits, found = {{}, {}, {}, {}}, {{}, {}, {}, {}}, {}, 0
  I.served = I.served or {0, 0, 0, 0}
  for p = 1, #keys do
    local from, n, f = tiers[p], counts[p], 0
    if from then
      I.tick(n, n)
      local to = (from == 4 or from <= I.top) and from or math.max(I.top, from - n)
      while to < 3 and I.capacity[to] == 0 do to = to - 1 end        -- warm may have no capacity
      if I.lfu then
        f = math.min(15, I.frequency(scores[p]) + n)
        -- A read of an entry at the old end of cold is a signal that the window is too wide.
        if from == 3 and I.grow >= 1 and scores[p] <= (I.tail or 0) then I.adapt(-1) end
      end
      if to ~= from then
        leave[from][#leave[from] + 1] = keys[p]
        I.promoted = true
      end
      local e = enter[to]
      e[#e + 1] = I.text(I.pack_score(I.clock, f)); e[#e + 1] = keys[p]
      local had, size = I.unpack_size(sizes[p])
      if had + n < MAX_HITS then hits[#hits + 1] = keys[p]; hits[#hits + 1] = I.pack_size(had + n, size) end
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
end

-- Record a report: the reads that a process made without a script. A report is recorded once, even if it is delivered
-- several times.
function I.report(writer, seq, keys, counts, counters)
  local field = 'w:' .. writer
  local last = whole_number(string.match(I.call('HGET', I.meta, field) or '0', '^%d+')) or 0
  if last >= seq then return end
  I.writer = {field, seq .. ' ' .. I.text(I.now_ms)}
  I.counters = counters
  if #keys > 0 then I.record_reads(keys, counts) end
end
