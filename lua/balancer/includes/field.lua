-- Return the value of a field; nil if the record has no such field. The field may be at any position in the record.
local function field(record, name)
  local _, at = string.find(' ' .. record, ' ' .. name .. '=', 1, true)
  return at and match(record, '^%S+', at)
end
