-- Needs records.lua.

-- Return two sums for the reply to a grant: the loads of all instances, and the capacities of the instances that take
-- work. If another program has written something that is not a whole number into a field, the field counts as 0.
local function sums()
  local found = call('HMGET', STATE, '#load', '#cap')
  local load, cap = match(found[1] or '0', '^%d+$') or '0', match(found[2] or '0', '^%d+$') or '0'
  return #load <= 15 and load + 0 or 0, #cap <= 15 and cap + 0 or 0
end
