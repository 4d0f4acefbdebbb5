-- The history of a cache or a pool. Any process may add samples to the history. Needs whole_number.lua.
--
-- The history is one hash. It holds time slices of three widths. The slices of each width form a ring with a fixed
-- number of slots. A new slice overwrites the old slice in its slot, so no script has to delete old slices.
--   claimed           start of the last sampled slice of 10 s, ms; no further sample is needed in this slice
--   totals            the totals of the last sample, each as name=value. The next sample subtracts them from its own
--   10s|1m|1h:<slot>  at=<start of the slice, ms> samples=<number of samples>, then each figure as name=value. The slot
--                     is the number of the slice since 1970, modulo the number of slots of the ring
-- Each figure has a kind:
--   count  a running total. Each sample adds to the slice the increase of the total since the previous sample
--   sum    the slice gets the sum over its samples
--   max    the slice gets the largest value of its samples
--   last   the slice gets the value of its last sample
-- A figure that is 0 is left out of the slice.
local HISTORY_KEPT_MS = 691200000  -- 8 days, the time that the ring of hours covers
local HISTORY_RINGS = {{'10s', 10000, 90}, {'1m', 60000, 180}, {'1h', 3600000, 192}}
local MAX_FIGURE = 8e15            -- up to this number, sums are exact

-- Read name=value words. Returns nil if a value is no whole number.
local function history_words(text)
  local words = {}
  for name, value in string.gmatch(text or '', '(%S-)=(%S*)') do
    words[name] = whole_number(value)
    if not words[name] then return nil end
  end
  return words
end

-- Read the fields that a sample needs, and write nothing. Returns a table for `save_history`. If the current slice of
-- 10 s is sampled already, returns nil and the time until the next slice begins, ms. If the history holds unexpected
-- data, returns nil, 0 and an error reply.
local function open_history(HISTORY, now_ms)
  local slots, fields = {}, {'claimed', 'totals'}
  for r, ring in ipairs(HISTORY_RINGS) do
    local number = math.floor(now_ms / ring[2])
    slots[r] = {ring[1] .. ':' .. string.format('%.0f', number % ring[3]), number * ring[2]}
    fields[r + 2] = slots[r][1]
  end
  local got = redis.pcall('HMGET', HISTORY, unpack(fields))
  if got.err then return nil, 0, redis.error_reply('CORRUPT ' .. HISTORY .. ' something else (' .. got.err .. ')') end
  local claimed, totals = whole_number(got[1], 0), history_words(got[2])
  for r, slot in ipairs(slots) do
    slot[3] = history_words(got[r + 2])
    if not slot[3] then totals = nil end
  end
  if not claimed or not totals then
    return nil, 0, redis.error_reply('CORRUPT ' .. HISTORY .. ' a value that is no number')
  end
  local next_ms = slots[1][2] + HISTORY_RINGS[1][2] - now_ms
  if claimed == slots[1][2] then return nil, next_ms end
  return {key = HISTORY, slots = slots, totals = got[2] and totals, next_ms = next_ms}
end

-- Write a sample. Each figure is {name, kind, value}.
local function save_history(history, figures)
  local write, totals = {'claimed', string.format('%.0f', history.slots[1][2])}, {}
  for _, figure in ipairs(figures) do
    if figure[2] == 'count' then
      local before = history.totals and history.totals[figure[1]]
      totals[#totals + 1] = figure[1] .. '=' .. string.format('%.0f', figure[3])
      -- Without an earlier sample, the increase is unknown and counts as 0. If a total is lower than before, it was
      -- reset to 0 in between, so the increase is the whole total.
      figure[3] = not before and 0 or figure[3] < before and figure[3] or figure[3] - before
    end
  end
  write[3], write[4] = 'totals', table.concat(totals, ' ')
  for _, slot in ipairs(history.slots) do
    local begin, stored = slot[2], slot[3]
    if stored.at ~= begin then stored = {samples = 0} end
    local words = {string.format('at=%.0f', begin), string.format('samples=%.0f', (stored.samples or 0) + 1)}
    for _, figure in ipairs(figures) do
      local name, kind, value = figure[1], figure[2], figure[3]
      local old = stored[name]
      if old and (kind == 'count' or kind == 'sum') then value = old + value
      elseif old and kind == 'max' then value = math.max(old, value) end
      if value ~= 0 then words[#words + 1] = name .. '=' .. string.format('%.0f', math.min(value, MAX_FIGURE)) end
    end
    write[#write + 1], write[#write + 2] = slot[1], table.concat(words, ' ')
  end
  redis.call('HSET', history.key, unpack(write))
  redis.call('PEXPIRE', history.key, HISTORY_KEPT_MS)
end
