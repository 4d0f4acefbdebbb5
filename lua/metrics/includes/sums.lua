-- Shared by the scripts that add up stored counters. Redis converts text in an addition to a number in a third of the
-- time of tonumber. The addition raises an error for text that is no number, as do these functions: the script catches
-- it with pcall.

-- Integers in a reply have 64 bits. A larger sum, such as of costs in units of 10^-9, is returned as LARGEST.
local LARGEST = 9223372036854774784  -- the last double below 2^63
local function clamped(number)
  if number >= 0 and number < LARGEST then return number end
  if number >= LARGEST and number < 1e24 then return LARGEST end
  error('a number that no counter reaches', 0)  -- also NaN
end

-- The same for a time or an extreme duration, which is not a sum; -1 if it is unknown.
local function extreme(number)
  return number == -1 and -1 or clamped(number < 9e15 and number or -1)
end
local EXTREME = {min_us = math.min, first_ms = math.min, max_us = math.max, last_ms = math.max}
