-- Needs whole_number.lua.

-- Decode the reply that an earlier copy of the request has stored as "<status> <version> <number>". Returns nil if the
-- text does not have this form.
local function recorded(text)
  local status, version, number = string.match(text, '^(%-?%d) (%d+) (%-?%d+)$')
  if not whole_number(version) or #number > 17 then return nil end
  return {tonumber(status), whole_number(version), tonumber(number)}
end
