-- Needs records.lua.

-- Return #load and #cap for a reply that grants a lease: the sum of the loads of all instances, and the sum of the
-- capacities of the instances that take work. If another program has changed one of these fields to anything but a
-- whole number of at most 15 digits, the field counts as 0.
local function sums()
  local found = call('HMGET', STATE, '#load', '#cap')
  local load, cap = match(found[1] or '0', '^%d+$') or '0', match(found[2] or '0', '^%d+$') or '0'
  return #load <= 15 and load + 0 or 0, #cap <= 15 and cap + 0 or 0
end
