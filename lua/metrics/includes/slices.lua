-- Shared by the metrics scripts: the widths of the time slices, their names in UTC, and the names of keys. Needs
-- whole_number.lua.
local floor, format = math.floor, string.format

local TIERS = {{'10s', 10000, 19}, {'1m', 60000, 16}, {'1h', 3600000, 13}, {'1d', 86400000, 10}}
local NAME, WIDTH, SHOWN = 1, 2, 3
local OTHER = '__other__'
local MIN_CLOSED = 2  -- slices of 10 s are not closed: they have few fields and expire soon
local SETTLE_MS = 10000  -- processes flush the last samples of a slice within this time after its end, as a rule

local function whole(number)  -- tostring would lose digits from 2^47 up
  return format('%.0f', number)
end

-- Read a stored counter: a finite number from 0 on. A sum beyond 2^53 is stored in the form 1.5e+17. Returns nil for a
-- text that another program has written, and `missing` for a missing text.
local function counter(text, missing)
  if not text then return missing end
  local number = tonumber(text)
  return number and number >= 0 and number < 1e24 and number or nil
end

-- Return the stored TTL of each tier's slices, in ms; 0 if it is not stored. The second value is false if another
-- program has changed one of the TTLs. A valid retention has at most 10080 slices of one width.
local function stored_ttls(texts)
  local ttls, is_valid = {}, true
  for t = 1, 4 do
    ttls[t] = whole_number(texts[t], 0)
    is_valid = is_valid and ttls[t] and ttls[t] <= 10080 * TIERS[t][WIDTH]
  end
  return ttls, is_valid
end

-- Return the stored TTLs, whether they are stored in the form of this version, and whether all four are stored. Returns
-- nil and a reason if they cannot be used. Older versions store a hash, and this version stores a text. Scripts of
-- older versions refuse the text, as they should: they would miss the closed slices. If the text has the `expected`
-- TTLs, it is not parsed.
local SETTINGS_FORM = 'schema=2 10s=%.0f 1m=%.0f 1h=%.0f 1d=%.0f'
local WRONG_TTLS = 'TTLs that are no numbers of ms'
local function settings_ttls(key, expected)
  local text, texts = redis.call('MGET', key)[1], nil  -- MGET finds no text in a hash
  if text then
    if expected and text == format(SETTINGS_FORM, expected[1], expected[2], expected[3], expected[4]) then
      return expected, true, true
    end
    local schema = string.match(text, '^schema=(%d+) ')
    if schema and schema ~= '2' then return nil, 'the schema ' .. schema .. ', which another version has written' end
    texts = {string.match(text, '^schema=2 10s=(%d+) 1m=(%d+) 1h=(%d+) 1d=(%d+)$')}
    if not texts[1] then return nil, schema and WRONG_TTLS or 'a string' end
  else
    texts = redis.pcall('HMGET', key, '10s', '1m', '1h', '1d')
    if texts.err then return nil, 'something else (' .. texts.err .. ')' end
  end
  local ttls, is_valid = stored_ttls(texts)
  if not is_valid then return nil, WRONG_TTLS end
  return ttls, text and true or false, texts[1] and texts[2] and texts[3] and texts[4] and true or false
end

local function clock_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + floor(time[2] / 1000)
end

-- Return a timestamp such as 2026-11-22T16:45:10, cut to the precision of a slice width. The conversion of days to a
-- date is from H. Hinnant, chrono-Compatible Low-Level Date Algorithms.
local stamps = {}
local function stamp(ms, shown)
  local known = stamps[ms]
  if not known then
    local seconds = floor(ms / 1000)
    local days = floor(seconds / 86400) + 719468
    local era = floor(days / 146097)
    local doe = days - era * 146097
    local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
    local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
    local mp = floor((5 * doy + 2) / 153)
    local month = mp < 10 and mp + 3 or mp - 9
    local year = yoe + era * 400 + (month <= 2 and 1 or 0)
    local rest = seconds % 86400
    known = format('%04d-%02d-%02dT%02d:%02d:%02d', year, month, doy - floor((153 * mp + 2) / 5) + 1,
      floor(rest / 3600), floor(rest % 3600 / 60), rest % 60)
    stamps[ms] = known
  end
  return string.sub(known, 1, shown)
end

-- Return a name such as agentperf:{metrics:03}:1m:2026-11-22T16:45:research.
local function slice_key(tag, tier, start_ms, series)
  return tag .. tier[NAME] .. ':' .. stamp(start_ms, tier[SHOWN]) .. ':' .. series
end
