-- Shared by the scripts of alerts. Needs corrupt.lua and whole_number.lua.
local call, format, floor = redis.call, string.format, math.floor

local function clock_ms()
  local time = call('TIME')
  return time[1] * 1000 + floor(time[2] / 1000)
end

-- Return an error reply if a key exists and has another type than `wanted`, else nil.
local function of_other_type(key, wanted)
  local found = call('TYPE', key).ok
  if found ~= wanted and found ~= 'none' then return corrupt(key, 'a ' .. found) end
  return nil
end

-- Read the schedule of a rule, "every=<ms> next=<ms> token=<text>". Return nil if the text is not valid.
local function read_schedule(text)
  local every, due, token = string.match(text or '', '^every=(%d+) next=(%d+) token=(%S+)$')
  every, due = whole_number(every), whole_number(due)
  if not every or every == 0 or every > 86400000 or not due then return nil end
  return {every = every, due = due, token = token}
end

local function write_schedule(every, due, token)
  return 'every=' .. format('%.0f', every) .. ' next=' .. format('%.0f', due) .. ' token=' .. token
end

-- Read a waiting notification, "attempts=<n> made=<ms> <payload>". Return nil if the text is not valid.
local function read_notice(text)
  local attempts, made, payload = string.match(text or '', '^attempts=(%d+) made=(%d+) (.*)$')
  attempts, made = whole_number(attempts), whole_number(made)
  if not attempts or not made then return nil end
  return {attempts = attempts, made = made, payload = payload}
end

-- Read the state of an address, "attempts=<n> failed=<ms> dropped=<n> error=<text>". Return nil if the text is not
-- valid. If there is no text, return the state of a new address.
local function read_address(text)
  if not text then return {attempts = 0, failed = 0, dropped = 0, error = ''} end
  local attempts, failed, dropped, wrong = string.match(text, '^attempts=(%d+) failed=(%d+) dropped=(%d+) error=(%S*)$')
  attempts, failed, dropped = whole_number(attempts), whole_number(failed), whole_number(dropped)
  if not attempts or not failed or not dropped then return nil end
  return {attempts = attempts, failed = failed, dropped = dropped, error = wrong}
end

local function write_address(of)
  return 'attempts=' .. format('%.0f', of.attempts) .. ' failed=' .. format('%.0f', of.failed) ..
    ' dropped=' .. format('%.0f', of.dropped) .. ' error=' .. of.error
end
