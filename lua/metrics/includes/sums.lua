-- Shared by the scripts that add up stored counters. An addition such as `text + 0` converts a text to a number in a
-- third of the time that tonumber needs. If the text is no number, the addition raises an error. The functions below
-- also raise errors. The calling script catches all these errors with pcall.

-- Integers in a reply have 64 bits. A sum that does not fit is returned as LARGEST. A sum of costs can be that large,
-- because a cost of 1 is stored as 10^9.
local LARGEST = 9223372036854774784  -- the last double below 2^63
local function clamped(number)
  if number >= 0 and number < LARGEST then return number end
  if number >= LARGEST and number < 1e24 then return LARGEST end
  error('a number that no counter reaches', 0)  -- NaN also gets here
end

-- Check a time or a duration. A valid value is -1 (unknown), or it is at least 0 and below 9e15. Any other value raises
-- an error: unlike sums, times and durations never reach 9e15.
local function extreme(number)
  return number == -1 and -1 or clamped(number < 9e15 and number or -1)
end
local EXTREME = {min_us = math.min, first_ms = math.min, max_us = math.max, last_ms = math.max}
