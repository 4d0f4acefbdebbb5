-- series: return the counters of some series for each step of a window.
-- KEYS
--   agents     ZSET  agentperf:{metrics:<shard>}:agents; only its hash tag is used
--   settings   HASH  agentperf:{metrics:<shard>}:settings
--   Other keys under the same hash tag are computed here. For each series, these are the keys of its slices and of its
--   lists of closed slices.
-- ARGV
--   window_ms  int   length of the window, ms
--   as_of_ms   int   end of the window, ms since 1970; it may be in the future; -1 for now
--   step_ms    int   length of a step, ms: a multiple of 10000. Each step begins at a multiple of step_ms since 1970
--   names...   text  the series, percent-encoded
-- RETURNS
--   {1, now_ms, from_ms, to_ms, ...} then for each series: name, steps. All steps of a series are one text, in which a
--                   newline ends each step. A step has these parts, separated by the character 31: the number of the
--                   step, counted from 0; for each closed slice, a bar and the line that stores this slice (see
--                   includes/closed.lua); for each counter in the hashes of the slices, its field and its value. A step
--                   without data may be left out. The steps cover [from_ms, to_ms). This range contains the window up
--                   to now; no step begins after now
--   {0, width_ms, 0, 0}  the step does not fit: a part of the window is kept only in slices of width_ms or more
-- REPEAT  reads only
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a field that is no number
-- COST    O(series x slices x fields); one slice per step if a step is as long as a slice
--@include corrupt
--@include whole_number
--@include slices
--@include cover
--@include sums
--@include closed
local AGENTS, SETTINGS = KEYS[1], KEYS[2]
local WINDOW_MS, AS_OF_MS, STEP_MS = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local NAMES = 4
local SEPARATOR = '\31'  -- error types may contain spaces, but no control characters

local tag = string.sub(AGENTS, 1, -7)
local now = clock_ms()
local KEEP, wrong_settings = settings_ttls(SETTINGS)
if not KEEP then return corrupt(SETTINGS, wrong_settings) end

local ending = AS_OF_MS < 0 and now or AS_OF_MS
local from = floor(math.max(0, ending - WINDOW_MS) / STEP_MS) * STEP_MS
local to = math.ceil((AS_OF_MS < 0 and now + 1 or math.min(ending, now + 1)) / STEP_MS) * STEP_MS

-- The slices of a step are chosen as for a window that begins and ends with the step. For each step, `starts` holds a
-- list of key prefixes, one for each slice. If no slice of the step is kept any longer, this list is empty. In a key,
-- the name of the series follows the prefix. `ranges` holds the slices of 1 min and more, in the form that
-- `closed_lines` needs. The field `at` of a range maps the stamp of each slice to the index of its step in `starts`.
local starts, ranges, of_tier = {}, {}, {}
local oldest = oldest_kept(now, KEEP) or to
for begin = from, to - STEP_MS, STEP_MS do
  local to_now = begin + STEP_MS > now
  local stop = to_now and now + 1 or begin + STEP_MS
  local at = math.max(begin, math.min(oldest, stop))
  local slices, _, _, misfit = covering(at, stop, to_now, now, KEEP)
  if misfit then return {0, misfit, 0, 0} end
  local prefixes = {}
  for s = 1, #slices do
    local tier, start = slices[s][1], slices[s][2]
    prefixes[s] = slice_key(tag, tier, start, '')
    local range = of_tier[tier]
    if tier ~= TIERS[1] then
      if not range or range.last + tier[WIDTH] ~= start then
        range = closed_range(tier, start)
        of_tier[tier], ranges[#ranges + 1] = range, range
      end
      range.last, range.at[stamp(start, tier[SHOWN])] = start, #starts + 1
    end
  end
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

-- With steps of a minute, an hour of a thousand agents has 60,000 steps. Usually, a step has only one slice. To save
-- time, the fields of such a step are returned as they are stored. There are two exceptions, which `append_sums`
-- handles: a number that may be stored in the form 1.5e+17 or 1e+8, and a slice with many fields. Most fields of such a
-- slice are counters of models, which `append_sums` omits.
local MAX_PLAIN = 128
local NO_LINES, NO_FIELDS = {}, {}
local function append_step(number, prefixes, name, lines, without_hashes)
  key = prefixes[1] .. name
  local got = without_hashes and #lines > 0 and #prefixes == 1 and NO_FIELDS or call('HGETALL', key)
  local most = #prefixes == 1 and #got <= MAX_PLAIN and 0 or 1e14
  for i = 2, #got, 2 do
    local value = got[i] + 0
    if not (value >= 0) then clamped(value) end
    if value >= 1e8 and value % 1e8 == 0 then value = 1e14 end  -- Redis 7.2 may have stored 1e+8: use `append_sums`
    if value > most then most = value end
  end
  if most < 1e14 and #got == 0 and #lines == 0 then return end
  size = size + 1
  text[size] = number
  for l = 1, #lines do
    text[size + 1], text[size + 2] = '|', lines[l]
    size = size + 2
  end
  if most >= 1e14 then
    append_sums(got, prefixes, name)
  elseif #got > 0 then
    size = size + 1
    text[size] = table.concat(got, SEPARATOR)
  end
  text[size + 1] = '\n'
  size = size + 1
end

local is_listed  -- whether any series of the current group may have a list of closed slices

-- Return two values. The first maps the index of a step in `starts` to the lines of the closed slices of this step. The
-- second says whether `append_step` may skip the hashes of all steps that cover a single slice and have a line for it.
-- That is so if no hash of these slices exists, which is the usual case; without such steps, it is false.
local function lines_of_steps(name)
  local found, hashes = {}, {}
  if not is_listed then return found, false end
  for _, range in ipairs(ranges) do
    key = closed_key(tag, range.tier, name)
    for _, line in ipairs(closed_lines(key, range, now)) do
      local number = range.at[stamp_of(line, range.tier)]
      local lines = found[number] or {}
      found[number], lines[#lines + 1] = lines, line
      if #starts[number] == 1 then hashes[#hashes + 1] = starts[number][1] .. name end
    end
  end
  return found, #hashes > 0 and call('EXISTS', unpack(hashes)) == 0
end

local function wrong_text(wrong)
  return 'something else (' .. (type(wrong) == 'table' and wrong.err or wrong) .. ')'
end

local reply = {1, now, from, math.max(from, to)}
for i = NAMES, #ARGV do
  local name = ARGV[i]
  text, size = {}, 0
  if (i - NAMES) % GROUP == 0 then is_listed = may_be_listed(tag, ranges, ARGV, i, math.min(i + GROUP - 1, #ARGV)) end
  local fine, lines, without_hashes = pcall(lines_of_steps, name)
  if not fine then return corrupt(key, wrong_text(lines)) end
  for number = 1, #starts do
    local wrong
    if #starts[number] > 0 then
      local of_step = lines[number] or NO_LINES
      fine, wrong = pcall(append_step, number - 1, starts[number], name, of_step, without_hashes)
    end
    if not fine then return corrupt(key, wrong_text(wrong)) end
  end
  reply[#reply + 1] = name
  reply[#reply + 1] = table.concat(text, SEPARATOR)
end
return reply
