-- read: return the counters of some series, either of all time or added up over the slices that cover a window.
-- KEYS
--   agents     ZSET  agentperf:{metrics:<shard>}:agents; only its hash tag is used
--   settings   HASH  agentperf:{metrics:<shard>}:settings
--   The keys of the totals, slices, lists of closed slices and latest samples of the series are computed here, under
--   the same hash tag.
-- ARGV
--   window_ms  int   length of the window, ms; 0 for all time
--   as_of_ms   int   end of the window, ms since 1970; it may be in the future; -1 for now
--   max_exact  int   max number of raw durations to return for a series. If the window has more samples, or not all of
--                    them are stored, no durations are returned. -1: the reply has the second form below, which has no
--                    durations, buckets, error types or models
--   names...   text  the series, percent-encoded
-- RETURNS
--   {1, now_ms, from_ms, to_ms, ...}  then for each series: name, number of its fields, name and value of each field,
--                   raw durations, lines of the closed slices. The raw durations are one text of numbers in us,
--                   separated by spaces; the text is empty if no durations are returned (see max_exact). The counters
--                   in the lines are not added to the fields. The client adds them, because it parses the lines faster
--                   than the script. The window is [from_ms, to_ms)
--   {1, now_ms, from_ms, to_ms, ...}  if max_exact is -1; then for each series: name, n, ok, err, sum_us, llm_calls,
--                   tool_calls, tok_in, tok_out, cost_nano, min_us, max_us, last_ms, first_ms, tok_cached_in,
--                   tok_cache_write, tok_reasoning. min_us, max_us, last_ms and first_ms are -1 if unknown. For a
--                   window, first_ms is always -1
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a field that is no number
-- COST    O(series x slices x fields); a window needs about a dozen slices, 120 at most
--@include corrupt
--@include whole_number
--@include slices
--@include cover
--@include sums
--@include closed
local AGENTS, SETTINGS = KEYS[1], KEYS[2]
local WINDOW_MS, AS_OF_MS = tonumber(ARGV[1]), tonumber(ARGV[2])
local MAX_EXACT, NAMES = tonumber(ARGV[3]), 4

local tag = string.sub(AGENTS, 1, -7)
local now = clock_ms()
local KEEP, wrong_settings = settings_ttls(SETTINGS)
if not KEEP then return corrupt(SETTINGS, wrong_settings) end
local from, to = 0, now + 1

-- Extend the window to whole slices. The start of the window is rounded down to the start of the narrowest kept slice
-- that contains it. If the window ends in the past, its end is rounded up in the same way.
local slices = {}
if WINDOW_MS > 0 then
  local to_now = AS_OF_MS < 0 or AS_OF_MS >= now
  local ending = AS_OF_MS < 0 and now or AS_OF_MS
  local start = math.max(ending - WINDOW_MS, math.min(oldest_kept(now, KEEP) or 0, ending))
  local t = start <= now and finest(start, now, KEEP) or nil
  if t then
    if not to_now then
      local width = TIERS[finest(ending, now, KEEP) or 4][WIDTH]
      to = math.ceil(ending / width) * width
    end
    local width = TIERS[t][WIDTH]
    slices, from, to = covering(floor(start / width) * width, to, to_now, now, KEEP)
  else
    from, to = ending, ending
  end
end

-- For all time, a series is read from its total. For a window, it is read from its slices, whose counters are added up.
-- `starts` holds the prefixes of the keys to read. In a key, the name of the series follows the prefix.
local starts = {}
if WINDOW_MS == 0 then starts[1] = tag .. 'total:' end
local ranges, outside = {}, {}  -- `ranges`: the slices that may be closed; `outside`: the prefixes of all other slices
for s = 1, #slices do
  local tier, start = slices[s][1], slices[s][2]
  starts[s] = slice_key(tag, tier, start, '')
  if tier == TIERS[1] or start + tier[WIDTH] + SETTLE_MS > now then
    outside[#outside + 1] = starts[s]
  else
    local range = ranges[#ranges]
    if not range or range.tier ~= tier or range.last + tier[WIDTH] ~= start then
      range = closed_range(tier, start)
      ranges[#ranges + 1] = range
    end
    range.last, range.at[stamp(start, tier[SHOWN])] = start, starts[s]
  end
end

local reply, size, key = {1, now, from, to}, 4, nil
local function append(item)
  size = size + 1
  reply[size] = item
end
local call = redis.call
local NONE = {}
local lines, hashes = NONE, starts  -- of one series: the lines of its closed slices, and the prefixes of its hashes
local is_listed                     -- whether any series of the current group may have a list of closed slices

-- Set `lines` and `hashes` for a series. A slice with a line rarely has a hash as well. So one EXISTS checks all slices
-- with a line. If none of them has a hash, `hashes` need not contain these slices.
local function find_slices(name)
  lines, hashes = NONE, starts
  if not is_listed then return end
  local all, keys, closed = true, {}, {}
  for r = 1, #ranges do
    local range = ranges[r]
    key = closed_key(tag, range.tier, name)
    local found, is_complete = closed_lines(key, range, now)
    all = all and is_complete
    for l = 1, #found do
      local prefix = range.at[string.sub(found[l], 1, range.tier[SHOWN])]
      if not prefix then error(NO_SLICE, 0) end
      keys[#keys + 1] = prefix .. name
      if not is_complete then closed[prefix] = true end
    end
    if r == 1 then lines = found
    else
      for l = 1, #found do lines[#lines + 1] = found[l] end
    end
  end
  if #keys == 0 or call('EXISTS', unpack(keys)) > 0 then return end
  hashes = outside
  if not all then
    hashes = {}  -- slices of complete ranges are included: they have no hash, and reading a missing key is harmless
    for s = 1, #starts do
      if not closed[starts[s]] then hashes[#hashes + 1] = starts[s] end
    end
  end
end

-- `plain` must be fast, because an overview needs it for every agent. So each counter is added up in a local variable.
-- Reading a field takes 0.25 us per slice, so some fields are read only if they are needed. The field err is read only
-- if not all executions succeeded. The counters of models and tools are written together with llm_calls, so they are
-- read only if llm_calls exists. The last timestamp is read only from the newest hash that has one.
local function plain(name)
  local n, ok, err, sum_us, llm_calls, tool_calls, tok_in, tok_out, cost_nano = 0, 0, 0, 0, 0, 0, 0, 0, 0
  local tok_cached_in, tok_cache_write, tok_reasoning = 0, 0, 0
  local min_us, max_us, last_ms, first_ms = -1, -1, -1, -1
  find_slices(name)
  for s = #hashes, 1, -1 do
    key = hashes[s] .. name
    local got
    if last_ms < 0 then
      got = call('HMGET', key, 'n', 'ok', 'sum_us', 'min_us', 'max_us', 'llm_calls', 'last_ms')
      last_ms = (got[7] or -1) + 0
    else
      got = call('HMGET', key, 'n', 'ok', 'sum_us', 'min_us', 'max_us', 'llm_calls')
    end
    if got[1] then
      n, ok, sum_us = n + got[1], ok + (got[2] or 0), sum_us + (got[3] or 0)
      local least, most = (got[4] or -1) + 0, (got[5] or -1) + 0
      if min_us < 0 or (least >= 0 and least < min_us) then min_us = least end
      if most > max_us then max_us = most end
      if got[1] ~= got[2] then err = err + (call('HGET', key, 'err') or 0) end
    end
    if got[6] then
      local used = call('HMGET', key, 'tool_calls', 'tok_in', 'tok_out', 'cost_nano',
        'tok_cached_in', 'tok_cache_write', 'tok_reasoning')
      llm_calls, tool_calls, tok_in = llm_calls + got[6], tool_calls + (used[1] or 0), tok_in + (used[2] or 0)
      tok_out, cost_nano = tok_out + (used[3] or 0), cost_nano + (used[4] or 0)
      tok_cached_in, tok_cache_write = tok_cached_in + (used[5] or 0), tok_cache_write + (used[6] or 0)
      tok_reasoning = tok_reasoning + (used[7] or 0)
    end
  end
  for l = 1, #lines do
    local line_n, line_ok, line_sum, line_min, line_max, line_last = string.match(lines[l], USUAL)
    if not line_n then
      local fields = {}
      add_head(lines[l], fields)
      line_n, line_ok, err = fields.n or 0, fields.ok or 0, err + (fields.err or 0)
      line_sum, line_min, line_max = fields.sum_us or 0, fields.min_us or -1, fields.max_us or -1
      line_last = fields.last_ms or -1
      if fields.llm_calls then
        llm_calls, tool_calls = llm_calls + fields.llm_calls, tool_calls + (fields.tool_calls or 0)
        tok_in, tok_out = tok_in + (fields.tok_in or 0), tok_out + (fields.tok_out or 0)
        cost_nano = cost_nano + (fields.cost_nano or 0)
        tok_cached_in = tok_cached_in + (fields.tok_cached_in or 0)
        tok_cache_write = tok_cache_write + (fields.tok_cache_write or 0)
        tok_reasoning = tok_reasoning + (fields.tok_reasoning or 0)
      end
    end
    n, ok, sum_us = n + line_n, ok + line_ok, sum_us + line_sum
    line_min, line_max, line_last = line_min + 0, line_max + 0, line_last + 0
    if min_us < 0 or (line_min >= 0 and line_min < min_us) then min_us = line_min end
    if line_max > max_us then max_us = line_max end
    if line_last > last_ms then last_ms = line_last end
  end
  if WINDOW_MS == 0 then first_ms = (call('HGET', key, 'first_ms') or -1) + 0 end
  local all = n + ok + err + sum_us + llm_calls + tool_calls + tok_in + tok_out + cost_nano
    + tok_cached_in + tok_cache_write + tok_reasoning
  if not (all < 9e15 and n >= 0 and ok >= 0 and err >= 0 and sum_us >= 0 and llm_calls >= 0 and tool_calls >= 0
    and tok_in >= 0 and tok_out >= 0 and cost_nano >= 0 and tok_cached_in >= 0 and tok_cache_write >= 0
    and tok_reasoning >= 0) then  -- rare: usually all sums are in range
    n, ok, err, sum_us = clamped(n), clamped(ok), clamped(err), clamped(sum_us)
    llm_calls, tool_calls, tok_in, tok_out = clamped(llm_calls), clamped(tool_calls), clamped(tok_in), clamped(tok_out)
    cost_nano, tok_cached_in = clamped(cost_nano), clamped(tok_cached_in)
    tok_cache_write, tok_reasoning = clamped(tok_cache_write), clamped(tok_reasoning)
  end
  if not (min_us >= 0 and min_us < 9e15 and max_us >= 0 and max_us < 9e15 and last_ms >= 0 and last_ms < 9e15) then
    min_us, max_us, last_ms = extreme(min_us), extreme(max_us), extreme(last_ms)
  end
  reply[size + 1], reply[size + 2], reply[size + 3], reply[size + 4] = n, ok, err, sum_us
  reply[size + 5], reply[size + 6], reply[size + 7], reply[size + 8] = llm_calls, tool_calls, tok_in, tok_out
  reply[size + 9], reply[size + 10], reply[size + 11] = cost_nano, min_us, max_us
  reply[size + 12], reply[size + 13] = last_ms, extreme(first_ms)
  reply[size + 14], reply[size + 15], reply[size + 16] = tok_cached_in, tok_cache_write, tok_reasoning
  size = size + 16
end

-- Return the durations of the n samples in the window, ordered by the ends of the samples; nil if not all n are found.
-- The list of samples is in the order of the flushes, and a late flush may append earlier samples. So the script first
-- reads the positions that the samples would have in a sorted list, with a margin. If this does not find exactly n
-- samples, and the list has at most MAX_EXACT samples, the script reads the whole list. The first 13 digits of a sample
-- are the time of its end, ms.
local MARGIN = 32
local function durations(name, n)
  key = tag .. 'latest:' .. name
  local after, before = whole(from), whole(to)
  local found
  local function look(first, last)
    local samples, in_order = call('LRANGE', key, first, last), true
    for s = 2, #samples do
      if samples[s] < samples[s - 1] then
        in_order = false
        break
      end
    end
    if not in_order then table.sort(samples) end
    local low, high = 1, #samples
    while low <= high and samples[low] < after do low = low + 1 end
    while low <= high and samples[high] >= before do high = high - 1 end
    if high - low + 1 ~= n then return false end
    found = {}
    for s = low, high do
      local us = string.match(samples[s], '^|(%d+)us|', 14)
      if not us or #us > 15 then return false end
      found[s - low + 1] = us
    end
    return true
  end
  local size = call('LLEN', key)
  local below, above = 0, size
  if to > now then below = size end
  while below < above do
    local middle = floor((below + above) / 2)
    if call('LRANGE', key, middle, middle)[1] < before then below = middle + 1 else above = middle end
  end
  local is_found = look(math.max(0, below - n - MARGIN), below + MARGIN)
  if not is_found and size > n and size <= MAX_EXACT then is_found = look(0, -1) end
  return is_found and table.concat(found, ' ') or nil
end

local function full(name)
  local fields = {}
  find_slices(name)
  for s = 1, #hashes do
    key = hashes[s] .. name
    local got = call('HGETALL', key)
    for i = 1, #got, 2 do
      local field = got[i]
      local old = fields[field]
      if not old then fields[field] = got[i + 1] + 0
      elseif EXTREME[field] then fields[field] = EXTREME[field](old, got[i + 1])
      else fields[field] = old + got[i + 1] end
    end
  end
  local counted = size + 1
  append(0)
  for field, value in pairs(fields) do
    if EXTREME[field] then value = extreme(value)
    elseif not (value >= 0 and value < LARGEST) then value = clamped(value) end  -- this check saves most calls
    reply[size + 1], reply[size + 2] = field, value
    size = size + 2
  end
  reply[counted] = (size - counted) / 2
  local n = fields.n or 0
  for l = 1, #lines do n = n + (string.match(lines[l], '^%S+ n=(%d+) ') or 0) end
  append(n > 0 and n <= MAX_EXACT and durations(name, n) or '')
  append(table.concat(lines, '\n'))
end

local read = MAX_EXACT < 0 and plain or full
for i = NAMES, #ARGV do
  if (i - NAMES) % GROUP == 0 then is_listed = may_be_listed(tag, ranges, ARGV, i, math.min(i + GROUP - 1, #ARGV)) end
  append(ARGV[i])
  local fine, wrong = pcall(read, ARGV[i])
  if not fine then return corrupt(key, 'something else (' .. (type(wrong) == 'table' and wrong.err or wrong) .. ')') end
end
return reply
