-- Read a stored whole number. Another program may have changed it, and tonumber also accepts "nan", "inf", "1e400" and
-- "0x10". Returns nil for these, for a negative number and for one from 9 * 10^15 on; returns `missing` for a missing
-- text. Below that bound, a double is exact, and '%d' prints a number and its successors correctly.
local function whole_number(text, missing)
  if not text then return missing end
  local number = #text <= 16 and string.match(text, '^%d+$') and tonumber(text)
  return number and number < 9e15 and number or nil
end
