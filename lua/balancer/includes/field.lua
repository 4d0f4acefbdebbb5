-- Return the value of a field, which may be at any position in the record; nil if the field is missing.
local function field(record, name)
  local _, at = string.find(' ' .. record, ' ' .. name .. '=', 1, true)
  return at and match(record, '^%S+', at)
end
