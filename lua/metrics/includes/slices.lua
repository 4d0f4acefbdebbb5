-- Shared by the metrics scripts: the widths and TTLs of the time slices, their stamps in UTC, and their keys. Needs
-- whole_number.lua.
local floor, format = math.floor, string.format

local TIERS = {{'10s', 10000, 19}, {'1m', 60000, 16}, {'1h', 3600000, 13}, {'1d', 86400000, 10}}
local NAME, WIDTH, SHOWN = 1, 2, 3
local OTHER = '__other__'
local MIN_CLOSED = 2  -- index in TIERS; slices of 10 s are never closed, because they have few fields and expire soon
local SETTLE_MS = 10000  -- by this time after the end of a slice, processes have usually flushed its last samples

local function whole(number)  -- tostring would lose digits from 10^14 up
  return format('%.0f', number)
end

-- Read a stored counter: a number of at least 0 and below 10^24. A sum beyond 2^53 may be stored with an exponent, such
-- as 1.5e+17. Returns `missing` if there is no text. Returns nil if the text is no such number: another program has
-- written it.
local function counter(text, missing)
  if not text then return missing end
  local number = tonumber(text)
  return number and number >= 0 and number < 1e24 and number or nil
end

-- Return three values: the TTLs of the slices, ms, one for each width (0 if the TTL is not stored); whether the schema
-- of this version is stored; whether all four TTLs are stored. If the TTLs cannot be used, return nil and the reason. A
-- TTL is valid if it keeps at most 10080 slices of its width; 10080 is the number of minutes in a week. Older versions
-- of this library stored no schema. They do not know closed slices, and would return windows without them. To prevent
-- this, the TTLs are stored with a unit, such as 900000ms. Older versions refuse such TTLs.
local SCHEMA = '2'
local WRONG_TTLS = 'TTLs that are no numbers of ms'
local function settings_ttls(key)
  local stored = redis.pcall('HMGET', key, 'schema', '10s', '1m', '1h', '1d')
  if stored.err then
    if string.find(stored.err, 'WRONGTYPE', 1, true) then return nil, 'a ' .. redis.call('TYPE', key).ok end
    return nil, 'something else (' .. stored.err .. ')'
  end
  local schema, ttls, is_complete = stored[1], {}, true
  if schema and schema ~= SCHEMA then
    if not whole_number(schema) then return nil, 'a schema that is no number' end
    return nil, 'the schema ' .. schema .. ', which another version has written'
  end
  for t = 1, 4 do
    local text = stored[t + 1]
    local ttl = whole_number(text and string.gsub(text, 'ms$', ''), 0)
    if not (ttl and ttl <= 10080 * TIERS[t][WIDTH]) then return nil, WRONG_TTLS end
    ttls[t] = ttl
    is_complete = is_complete and text
  end
  return ttls, schema == SCHEMA, is_complete
end

local function clock_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + floor(time[2] / 1000)
end

-- Return a timestamp such as 2026-11-22T16:45:10, cut to its first `shown` characters. TIERS has `shown` for each
-- width. The conversion of days to a date is from H. Hinnant, chrono-Compatible Low-Level Date Algorithms.
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

-- Return the key of a slice, such as agentperf:{metrics:03}:1m:2026-11-22T16:45:research.
local function slice_key(tag, tier, start_ms, series)
  return tag .. tier[NAME] .. ':' .. stamp(start_ms, tier[SHOWN]) .. ':' .. series
end
