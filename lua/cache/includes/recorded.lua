-- Needs whole_number.lua.

-- Return the reply of a request that an earlier copy has stored under its id; nil if the text has another form.
local function recorded(text)
  local status, version, number = string.match(text, '^(%-?%d) (%d+) (%-?%d+)$')
  if not whole_number(version) or #number > 17 then return nil end
  return {tonumber(status), whole_number(version), tonumber(number)}
end
