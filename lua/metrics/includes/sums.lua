-- Shared by the scripts that add up stored counters. An addition converts text to a number in a third of the time that
-- tonumber needs. It raises an error for text that is no number, as do these functions. The script catches the error
-- with pcall.

-- Integers in a reply have 64 bits. A larger sum, such as of costs in units of 10^-9, is returned as LARGEST.
local LARGEST = 9223372036854774784  -- the last double below 2^63
local function clamped(number)
  if number >= 0 and number < LARGEST then return number end
  if number >= LARGEST and number < 1e24 then return LARGEST end
  error('a number that no counter reaches', 0)  -- also NaN
end

-- Check a time, or a shortest or longest duration; -1 means unknown. Such a value is not a sum, so 9 * 10^15 or more is
-- an error.
local function extreme(number)
  return number == -1 and -1 or clamped(number < 9e15 and number or -1)
end
local EXTREME = {min_us = math.min, first_ms = math.min, max_us = math.max, last_ms = math.max}
