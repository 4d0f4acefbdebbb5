-- Shared by the metrics scripts: closed slices. Needs slices.lua and sums.lua.
--
-- A slice is a hash while it is open. A flush closes a slice with many fields once its series has a sample that is at
-- least SETTLE_MS later than the end of the slice. The flush moves the counters to a line of text in a list, and
-- deletes the hash. A list has the closed slices of one series and one width, the oldest first. Example of a line:
--
--   2026-11-22T16 n=3600 ok=3599 err=1 sum_us=9830865887 ... err:TimeoutError=1 | -49:1 -44:3,1,0,2
--
-- The buckets of the histogram follow the bar: -44:3,1,0,2 means 3 samples in bucket -44, 1 in -43, none in -42, and 2
-- in -41. A line takes a third of the memory of the hash. Late samples of a closed slice go to a new hash. Once this
-- hash has many fields, its counters are added to the line. So a slice may have a line and a hash, and readers add up
-- both.
local BAR = ' | '
local NO_SLICE = 'a line that is no closed slice'

local function closed_key(tag, tier, series)
  return tag .. 'slices:' .. tier[NAME] .. ':' .. series
end

local function stamp_of(line, tier)  -- returns the start of the slice, in the form that `stamp` returns
  local found = string.match(line, '^(%d%d%d%d%-%d%d%-%d%d[T%d:]*) ')
  if not found or #found ~= tier[SHOWN] then error(NO_SLICE, 0) end
  return found
end

local function encode_name(name)
  return (string.gsub(name, '[%% =|]', function(sign) return format('%%%02X', string.byte(sign)) end))
end
local function decode_name(name)
  return (string.gsub(name, '%%(%x%x)', function(digits) return string.char(tonumber(digits, 16)) end))
end

-- Add to `fields` the counters that stand before the bar of a line. Returns the position of the bar. If the slice has
-- no buckets, the line has no bar, and the result is nil. Raises an error if `line` is not the line of a closed slice.
local USUAL = '^%S+ n=(%d+) ok=(%d+) sum_us=(%d+) min_us=(%d+) max_us=(%d+) last_ms=(%d+)() |'
local function add_head(line, fields)
  local n, ok, sum_us, min_us, max_us, last_ms, stop = string.match(line, USUAL)
  if n then  -- usual lines have only these counters; this branch takes half the time of the loop
    fields.n, fields.ok, fields.sum_us = (fields.n or 0) + n, (fields.ok or 0) + ok, (fields.sum_us or 0) + sum_us
    fields.min_us = math.min(fields.min_us or min_us + 0, min_us)
    fields.max_us, fields.last_ms = math.max(fields.max_us or 0, max_us), math.max(fields.last_ms or 0, last_ms)
    return stop
  end
  local bar = string.find(line, BAR, 1, true)
  local head = bar and string.sub(line, 1, bar - 1) or line
  local read = (string.find(head, ' ', 1, true) or 0) - 1
  for name, text in string.gmatch(head, ' ([^ =]+)=([^ =]+)') do
    read = read + 2 + #name + #text
    if string.find(name, '%', 1, true) then name = decode_name(name) end
    local old = fields[name]
    if not old then fields[name] = text + 0
    elseif EXTREME[name] then fields[name] = EXTREME[name](old, text)
    else fields[name] = old + text end
  end
  if read ~= #head then error(NO_SLICE, 0) end
  return bar
end

-- Add all counters of a line to `fields`, under the names that they have in a hash. The text of the buckets is changed
-- to JSON, such as [[-49,1],[-44,3,1,0,2]], and decoded. Reading the text with patterns would take twice the time.
local TO_JSON = {[' '] = '],[', [':'] = ','}
local bucket_names = {}
local function add_line(line, fields)
  local bar = add_head(line, fields)
  if not bar then return end
  local runs = string.gsub(string.sub(line, bar + #BAR), '[ :]', TO_JSON)
  runs = cjson.decode('[[' .. runs .. ']]')
  for r = 1, #runs do
    local run = runs[r]
    local before = run[1] - 2
    for i = 2, #run do
      local count = run[i]
      if count ~= 0 then
        local name = bucket_names[before + i]
        if not name then
          name = 'h:' .. before + i
          bucket_names[before + i] = name
        end
        fields[name] = (fields[name] or 0) + count
      end
    end
  end
end

-- Return a range of slices of one tier, for `closed_lines`. The fields `first` and `last` of the range are the starts
-- of its first and its last slice, ms. The caller later sets `last`. The caller also fills the field `at`, which maps
-- the stamp of each wanted slice to any true value.
local function closed_range(tier, first)
  return {tier = tier, first = first, last = first, at = {}}
end

-- Return whether any of the series `names[first]` to `names[last]` may have a list of closed slices. Series with few
-- executions have no such list. One command for GROUP series takes much less time than one command for each series.
local GROUP = 32
local function may_be_listed(tag, ranges, names, first, last)
  if first == last then return true end  -- for a single series, EXISTS would save no time
  local keys, tiers = {}, {}
  for r = 1, #ranges do tiers[ranges[r].tier] = true end  -- many ranges may share a tier, and thus a list
  for tier in pairs(tiers) do
    for i = first, last do keys[#keys + 1] = closed_key(tag, tier, names[i]) end
  end
  return #keys > 0 and redis.call('EXISTS', unpack(keys)) > 0
end

-- If a range ends at most MAX_NEWER slices before the current slice, the script also reads all later lines of the list.
-- This may save the binary search.
local MAX_NEWER = 16
-- Return the lines of the wanted slices of a range, and whether every wanted slice has a line. The script first reads
-- the part of the list where these lines are if no slice is missing from the list. If some of the lines may be outside
-- this part, a binary search finds the first line that is not older than the range.
local function closed_lines(key, range, now)
  local tier, shown = range.tier, range.tier[SHOWN]
  if not range.low then
    local current = floor(now / tier[WIDTH])
    range.low, range.high = range.first / tier[WIDTH] - current, range.last / tier[WIDTH] - current
    range.wanted = range.high - range.low + 1
    range.first_stamp, range.last_stamp = stamp(range.first, shown), stamp(range.last, shown)
    range.none = range.low > -1 or range.first + tier[WIDTH] + SETTLE_MS > now  -- no slice of the range can be closed
    if range.high >= -MAX_NEWER then range.high = -1 end
  end
  if range.none then return {}, false end
  local first, last, wanted = range.first_stamp, range.last_stamp, range.wanted
  local lines = redis.call('LRANGE', key, range.low, range.high)
  local count = #lines
  if count == 0 and range.high == -1 then return lines, false end
  if count == wanted and string.sub(lines[1], 1, shown) == first and string.sub(lines[count], 1, shown) == last then
    return lines, true
  end
  local has_first = count < range.high - range.low + 1 or string.sub(lines[1], 1, shown) == first
    or stamp_of(lines[1], tier) <= first
  local has_last = range.high == -1 or count > 0 and stamp_of(lines[count], tier) >= last
  if not (has_first and has_last) then
    local below, above = 0, redis.call('LLEN', key)
    if above == 0 then return {}, false end
    while below < above do
      local middle = floor((below + above) / 2)
      local line = redis.call('LRANGE', key, middle, middle)[1]
      if stamp_of(line, tier) < first then below = middle + 1 else above = middle end
    end
    lines = redis.call('LRANGE', key, below, below + wanted - 1)
  end
  local found = {}
  for _, line in ipairs(lines) do
    if range.at[string.sub(line, 1, shown)] or range.at[stamp_of(line, tier)] then found[#found + 1] = line end
  end
  return found, #found == wanted
end
