-- read: the counts of some series, of all time or added up over the slices that cover a window.
-- KEYS
--   agents      ZSET  agentperf:{metrics:<shard>}:agents; only its tag is used
--   settings    HASH  agentperf:{metrics:<shard>}:settings
--   The totals, slices and recent samples of the series are named here, under the same tag.
-- ARGV
--   window_ms   int   length of the window, ms; 0 is all time
--   as_of_ms    int   its end, ms since 1970, which may lie ahead; -1 is now
--   exact_most  int   send the raw durations of a series when they are all there and no more than this; -1 sends the
--                     plain counters only, without buckets, error types and models, in the second form below
--   names...    text  the series, percent-encoded
-- RETURNS
--   {1, now_ms, from_ms, to_ms, ...} and for each series: name, count of its fields, field and value of each, durations
--                     in us with spaces between (empty unless they are all there). The window is [from_ms, to_ms).
--   {1, now_ms, from_ms, to_ms, ...} and for each series: name, n, ok, err, sum_us, llm_calls, tool_calls, tok_in,
--                     tok_out, cost_nano, min_us, max_us, last_ms, first_ms, tok_cached_in, tok_cache_write,
--                     tok_reasoning; -1 for one of min_us to first_ms that is not known; a window's first_ms never is
--   {-1, key, error}  the key holds another type, or what is no number
-- REPEAT  reads only
-- ERRORS  none
-- COST    O(series x slices x fields); a window needs about a dozen slices, 120 at most
--@include slices
local agents, settings = KEYS[1], KEYS[2]
local window_ms, as_of_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local exact_most, names = tonumber(ARGV[3]), 4

local tag = string.sub(agents, 1, -7)
local now = clock_ms()
local KEEP = redis.pcall('HMGET', settings, '10s', '1m', '1h', '1d')
if KEEP.err then return {-1, settings, KEEP.err} end
-- Bounded, whatever the settings say, so that covering a window ends soon: more slices of a width are never kept.
for t = 1, 4 do KEEP[t] = math.min(tonumber(KEEP[t]) or 0, 10080 * TIERS[t][WIDTH]) end
local from, to = 0, now + 1

-- Cover the window from its start, each time with the widest slice that begins here and does not reach beyond the end;
-- the slice that holds this moment reaches just to now. The first begins where the finest slices still kept allow.
local slices = {}
if window_ms > 0 then
  local to_now = as_of_ms < 0 or as_of_ms >= now
  local ending = as_of_ms < 0 and now or as_of_ms
  local start = ending - window_ms
  local function finest(ms)
    for t = 1, 4 do
      local width = TIERS[t][WIDTH]
      if KEEP[t] > 0 and floor(ms / width) * width + width + KEEP[t] > now then return t end
    end
    return nil
  end
  local t = start <= now and finest(start) or nil
  while not t and start < ending and start <= now do  -- older than anything kept: begin where something is
    start = math.min(start + 86400000, ending)
    t = finest(start)
  end
  local begin
  if t then begin = floor(start / TIERS[t][WIDTH]) * TIERS[t][WIDTH] end
  if t and to_now then to = now + 1 elseif t then
    local width = TIERS[finest(ending) or 4][WIDTH]
    to = math.ceil(ending / width) * width
  end
  from = begin or ending
  local at = from
  while t and at < to do
    local taken
    for wide = 4, 1, -1 do
      local width = TIERS[wide][WIDTH]
      if at % width == 0 and KEEP[wide] > 0 and at + width + KEEP[wide] > now and (at + width <= to or (to_now and at + width > now)) then
        taken = wide
        break
      end
    end
    if not taken then  -- only wider slices are kept here: take the one that holds this moment, and begin or end with it
      taken = finest(at) or 4
      local width = TIERS[taken][WIDTH]
      at = floor(at / width) * width
      if #slices == 0 then from = at end
      to = math.max(to, math.min(at + width, now + 1))
    end
    slices[#slices + 1] = {TIERS[taken], at}
    at = at + TIERS[taken][WIDTH]
  end
  if not t then to = from end
end

-- What is added up for a series: its total, or its slices.
local starts = {}
if window_ms == 0 then starts[1] = tag .. 'total:' end
for s = 1, #slices do starts[s] = slice_key(tag, slices[s][1], slices[s][2], '') end

local reply, size, key = {1, now, from, to}, 4, nil
local function give(item)
  size = size + 1
  reply[size] = item
end
-- A reply's integers have 64 bits; a sum beyond them, such as of cost in billionths, stands still at the end.
local LARGEST = 9223372036854774784  -- the last double below 2^63
local function said(number)
  return number < LARGEST and number or LARGEST
end
-- Text becomes a number by adding it: a third of the time that tonumber takes. What is none raises, see below.
local EXTREME = {min_us = math.min, first_ms = math.min, max_us = math.max, last_ms = math.max}

-- Written out, since it is what an overview of all agents waits for. A field takes 0.25 us of each slice: so failures
-- are asked for where not all succeeded, the use of models and tools where one of its counters is there (they are written
-- together), and of moments the last, newest slice first.
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
      local used = call('HMGET', key, 'tool_calls', 'tok_in', 'tok_out', 'cost_nano', 'tok_cached_in', 'tok_cache_write', 'tok_reasoning')
      llm_calls, tool_calls, tok_in = llm_calls + got[6], tool_calls + (used[1] or 0), tok_in + (used[2] or 0)
      tok_out, cost_nano = tok_out + (used[3] or 0), cost_nano + (used[4] or 0)
      tok_cached_in, tok_cache_write = tok_cached_in + (used[5] or 0), tok_cache_write + (used[6] or 0)
      tok_reasoning = tok_reasoning + (used[7] or 0)
    end
  end
  if window_ms == 0 then first_ms = (call('HGET', key, 'first_ms') or -1) + 0 end  -- a window begins where it was asked to
  reply[size + 1], reply[size + 2], reply[size + 3], reply[size + 4] = n, ok, err, said(sum_us)
  reply[size + 5], reply[size + 6], reply[size + 7] = said(llm_calls), said(tool_calls), said(tok_in)
  reply[size + 8], reply[size + 9], reply[size + 10], reply[size + 11] = said(tok_out), said(cost_nano), min_us, max_us
  reply[size + 12], reply[size + 13] = last_ms, first_ms
  reply[size + 14], reply[size + 15], reply[size + 16] = said(tok_cached_in), said(tok_cache_write), said(tok_reasoning)
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
  give(0)
  for field, value in pairs(fields) do give(field); give(said(value)) end
  reply[counted] = (size - counted) / 2
  local n = fields.n or 0
  local durations = {}
  if n > 0 and n <= exact_most then
    key = tag .. 'recent:' .. name
    local members = call('ZRANGEBYSCORE', key, whole(from), '(' .. whole(to), 'LIMIT', 0, n + 1)
    if #members == n then
      for m = 1, n do
        local us = string.match(members[m], '^|(%d+)us|', 14)  -- after 13 digits of ms
        if not us then durations = {}; break end
        durations[m] = us
      end
    end
  end
  give(table.concat(durations, ' '))
end

local read = exact_most < 0 and plain or full
for i = names, #ARGV do
  give(ARGV[i])
  local fine, wrong = pcall(read, ARGV[i])
  if not fine then return {-1, key, type(wrong) == 'table' and wrong.err or wrong} end
end
return reply
