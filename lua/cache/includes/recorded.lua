-- Needs whole_number.lua.

-- Read a stored reply: an earlier copy of the request has left it there. Returns nil if the text has another form.
local function recorded(text)
  local status, version, number = string.match(text, '^(%-?%d) (%d+) (%-?%d+)$')
  if not whole_number(version) or #number > 17 then return nil end
  return {tonumber(status), whole_number(version), tonumber(number)}
end
