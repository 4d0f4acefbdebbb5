-- read: the counters of some series, of all time or aggregated over the slices that cover a window.
-- KEYS
--   agents     ZSET  agentperf:{metrics:<shard>}:agents; only its hash tag is used
--   settings   HASH  agentperf:{metrics:<shard>}:settings
--   The names of the totals, slices and recent samples of the series are computed here, under the same hash tag.
-- ARGV
--   window_ms  int   length of the window, ms; 0 for all time
--   as_of_ms   int   end of the window, ms since 1970; it may be in the future; -1 for now
--   max_exact  int   return the raw durations of a series if all are stored and there are at most this many. -1 returns
--                    only the plain counters, without buckets, error types and models: the second form below
--   names...   text  the series, percent-encoded
-- RETURNS
--   {1, now_ms, from_ms, to_ms, ...} and for each series: name, number of its fields, field and value of each,
--                     durations in us separated by spaces; none unless all are stored. The window is [from_ms, to_ms).
--   {1, now_ms, from_ms, to_ms, ...} and for each series: name, n, ok, err, sum_us, llm_calls, tool_calls, tok_in,
--                     tok_out, cost_nano, min_us, max_us, last_ms, first_ms, tok_cached_in, tok_cache_write,
--                     tok_reasoning. Each of min_us to first_ms is -1 if unknown. For a window, first_ms is always -1.
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: it holds another type, or a field that is no number
-- COST    O(series x slices x fields); a window needs about a dozen slices, 120 at most
--@include corrupt
--@include whole_number
--@include slices
--@include cover
--@include sums
local AGENTS, SETTINGS = KEYS[1], KEYS[2]
local WINDOW_MS, AS_OF_MS = tonumber(ARGV[1]), tonumber(ARGV[2])
local MAX_EXACT, NAMES = tonumber(ARGV[3]), 4

local tag = string.sub(AGENTS, 1, -7)
local now = clock_ms()
local KEEP, is_valid = redis.pcall('HMGET', SETTINGS, '10s', '1m', '1h', '1d'), nil
if KEEP.err then return corrupt(SETTINGS, 'something else (' .. KEEP.err .. ')') end
KEEP, is_valid = stored_ttls(KEEP)
if not is_valid then return corrupt(SETTINGS, 'TTLs that are no numbers of ms') end
local from, to = 0, now + 1

-- The first slice starts at a border of the narrowest slices that are kept for the start of the window.
local slices = {}
if WINDOW_MS > 0 then
  local to_now = AS_OF_MS < 0 or AS_OF_MS >= now
  local ending = AS_OF_MS < 0 and now or AS_OF_MS
  local start = ending - WINDOW_MS
  local t = start <= now and finest(start, now, KEEP) or nil
  while not t and start < ending and start <= now do  -- no slice this old is kept: try one day later
    start = math.min(start + 86400000, ending)
    t = finest(start, now, KEEP)
  end
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

-- A series is read from its total, or from its slices, whose counters are added up. `starts` holds the prefixes of
-- these keys. The name of the series follows each prefix.
local starts = {}
if WINDOW_MS == 0 then starts[1] = tag .. 'total:' end
for s = 1, #slices do starts[s] = slice_key(tag, slices[s][1], slices[s][2], '') end

local reply, size, key = {1, now, from, to}, 4, nil
local function append(item)
  size = size + 1
  reply[size] = item
end
-- The loop is written out for speed, because an overview of all agents waits for it. Reading a field takes 0.25 us per
-- slice. Therefore some fields are not always read. Failures are read only if not all executions succeeded. The
-- counters of models and tools are read only if one of them exists (all are written together). The last timestamp is
-- read only from the newest slice that has one.
local call = redis.call
local function plain(name)
  local n, ok, err, sum_us, llm_calls, tool_calls, tok_in, tok_out, cost_nano = 0, 0, 0, 0, 0, 0, 0, 0, 0
  local tok_cached_in, tok_cache_write, tok_reasoning = 0, 0, 0
  local min_us, max_us, last_ms, first_ms = -1, -1, -1, -1
  for s = #starts, 1, -1 do
    key = starts[s] .. name
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
  if WINDOW_MS == 0 then first_ms = (call('HGET', key, 'first_ms') or -1) + 0 end
  reply[size + 1], reply[size + 2], reply[size + 3] = clamped(n), clamped(ok), clamped(err)
  reply[size + 4], reply[size + 5], reply[size + 6] = clamped(sum_us), clamped(llm_calls), clamped(tool_calls)
  reply[size + 7] = clamped(tok_in)
  reply[size + 8], reply[size + 9], reply[size + 10] = clamped(tok_out), clamped(cost_nano), extreme(min_us)
  reply[size + 11], reply[size + 12], reply[size + 13] = extreme(max_us), extreme(last_ms), extreme(first_ms)
  reply[size + 14], reply[size + 15] = clamped(tok_cached_in), clamped(tok_cache_write)
  reply[size + 16] = clamped(tok_reasoning)
  size = size + 16
end

local function full(name)
  local fields = {}
  for s = 1, #starts do
    key = starts[s] .. name
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
    append(field)
    append(EXTREME[field] and extreme(value) or clamped(value))
  end
  reply[counted] = (size - counted) / 2
  local n = fields.n or 0
  local durations = {}
  if n > 0 and n <= MAX_EXACT then
    key = tag .. 'recent:' .. name
    local members = call('ZRANGEBYSCORE', key, whole(from), '(' .. whole(to), 'LIMIT', 0, n + 1)
    if #members == n then
      for m = 1, n do
        local us = string.match(members[m], '^|(%d+)us|', 14)  -- after 13 digits of ms
        if not us or #us > 15 then durations = {}; break end
        durations[m] = us
      end
    end
  end
  append(table.concat(durations, ' '))
end

local read = MAX_EXACT < 0 and plain or full
for i = NAMES, #ARGV do
  append(ARGV[i])
  local fine, wrong = pcall(read, ARGV[i])
  if not fine then return corrupt(key, 'something else (' .. (type(wrong) == 'table' and wrong.err or wrong) .. ')') end
end
return reply
