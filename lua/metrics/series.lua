-- series: the counters of some series, step by step over a window.
-- KEYS
--   agents     ZSET  agentperf:{metrics:<shard>}:agents; only its hash tag is used
--   settings   HASH  agentperf:{metrics:<shard>}:settings
--   The names of the slices of the series are computed here, under the same hash tag.
-- ARGV
--   window_ms  int   length of the window, ms
--   as_of_ms   int   end of the window, ms since 1970, which may be in the future; -1 for now
--   step_ms    int   length of a step, ms: a multiple of 10000. Steps begin at its multiples since 1970
--   names...   text  the series, percent-encoded
-- RETURNS
--   {1, now_ms, from_ms, to_ms, ...} and for each series: name, and its steps as text, one step per line. A line has
--                     the number of the step, counted from 0, and field and value of each counter, separated by spaces.
--                     A step without data has no line. The steps cover [from_ms, to_ms). This range contains the window
--                     up to now; no step begins after now
--   {0, width_ms, 0, 0}  the step does not fit: for a part of the window, only slices of width_ms or more are kept
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: it holds another type, or a field that is no number
-- COST    O(series x slices x fields); one slice per step if the step is as long as a slice of some width
--@include corrupt
--@include whole_number
--@include slices
--@include cover
--@include sums
local AGENTS, SETTINGS = KEYS[1], KEYS[2]
local WINDOW_MS, AS_OF_MS, STEP_MS = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local NAMES = 4
local SEPARATOR = '\31'  -- error types may contain spaces, but no control characters

local tag = string.sub(AGENTS, 1, -7)
local now = clock_ms()
local KEEP, is_valid = redis.pcall('HMGET', SETTINGS, '10s', '1m', '1h', '1d'), nil
if KEEP.err then return corrupt(SETTINGS, 'something else (' .. KEEP.err .. ')') end
KEEP, is_valid = stored_ttls(KEEP)
if not is_valid then return corrupt(SETTINGS, 'TTLs that are no numbers of ms') end

local ending = AS_OF_MS < 0 and now or AS_OF_MS
local from = floor(math.max(0, ending - WINDOW_MS) / STEP_MS) * STEP_MS
local to = math.ceil((AS_OF_MS < 0 and now + 1 or math.min(ending, now + 1)) / STEP_MS) * STEP_MS

-- The slices of a step are those of a window with the same start and end. `starts` holds the prefixes of their keys;
-- the name of the series follows each prefix. A step is empty if none of its slices is kept any longer.
local starts = {}
for begin = from, to - STEP_MS, STEP_MS do
  local to_now = begin + STEP_MS > now
  local stop = to_now and now + 1 or begin + STEP_MS
  local at = begin
  while at < stop and not finest(at, now, KEEP) do at = (floor(at / 86400000) + 1) * 86400000 end
  local slices, _, _, misfit = covering(at, stop, to_now, now, KEEP)
  if misfit then return {0, misfit, 0, 0} end
  local prefixes = {}
  for s = 1, #slices do prefixes[s] = slice_key(tag, slices[s][1], slices[s][2], '') end
  starts[#starts + 1] = prefixes
end

local call, key = redis.call, nil
local text, size
local function append(field, value)
  if EXTREME[field] then value = extreme(value) else value = clamped(value) end
  if value >= 0 then
    text[size + 1], text[size + 2] = field, whole(value)
    size = size + 2
  end
end
local function append_sums(first, prefixes, name)  -- `first` has the fields of the first slice
  local fields = {}
  for s = 1, #prefixes do
    key = prefixes[s] .. name
    local got = s == 1 and first or call('HGETALL', key)
    for i = 1, #got, 2 do
      local field = got[i]
      local old = fields[field]
      if not old then fields[field] = got[i + 1] + 0
      elseif EXTREME[field] then fields[field] = EXTREME[field](old, got[i + 1])
      else fields[field] = old + got[i + 1] end
    end
  end
  for field, value in pairs(fields) do
    if string.sub(field, 1, 4) ~= 'mdl:' then append(field, value) end
  end
end

-- With steps of a minute, an hour of a thousand agents has 60,000 steps. So if a step has one slice, as most steps do,
-- its fields are returned as they are. There are two exceptions. A number may be so large that it is stored in the form
-- 1.5e+17. Or the slice has many fields, most of which count error types and models.
local MAX_PLAIN = 128
local function append_step(number, prefixes, name)
  key = prefixes[1] .. name
  local got = call('HGETALL', key)
  local most = #prefixes == 1 and #got <= MAX_PLAIN and 0 or 1e14
  for i = 2, #got, 2 do
    local value = got[i] + 0
    if not (value >= 0) then clamped(value) end
    if value > most then most = value end
  end
  if most < 1e14 then
    if #got == 0 then return end
    text[size + 1], text[size + 2] = number, table.concat(got, SEPARATOR)
    size = size + 2
  else
    text[size + 1] = number
    size = size + 1
    append_sums(got, prefixes, name)
  end
  text[size + 1] = '\n'
  size = size + 1
end

local reply = {1, now, from, math.max(from, to)}
for i = NAMES, #ARGV do
  local name = ARGV[i]
  text, size = {}, 0
  for number = 1, #starts do
    local fine, wrong = true, nil
    if #starts[number] > 0 then fine, wrong = pcall(append_step, number - 1, starts[number], name) end
    if not fine then
      return corrupt(key, 'something else (' .. (type(wrong) == 'table' and wrong.err or wrong) .. ')')
    end
  end
  reply[#reply + 1] = name
  reply[#reply + 1] = table.concat(text, SEPARATOR)
end
return reply
