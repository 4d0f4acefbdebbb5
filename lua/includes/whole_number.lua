-- Read a stored whole number that is at least 0 and below 9 * 10^15. Returns nil if the text is no such number. Returns
-- `missing` if there is no text. Scripts use this function instead of tonumber, because another program may have
-- changed the text, and tonumber also accepts "nan", "inf", "1e400" and "0x10". Below 9 * 10^15, a double holds each
-- whole number exactly, even after small additions, and '%d' prints it correctly.
local function whole_number(text, missing)
  if not text then return missing end
  local digits = #text <= 16 and string.match(text, '^%d+$')
  local number = digits and digits + 0   -- takes a third of the time of tonumber
  return number and number < 9e15 and number or nil
end
