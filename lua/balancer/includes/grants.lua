-- The pattern and the functions for granting a lease. They are not in records.lua, because release includes
-- records.lua: it would create these functions on every call, and does not need them. Needs records.lua; pool.lua
-- describes all fields.

-- Matches the record of an instance that gets a lease. A grant changes only the fields up to peak. It copies the rest
-- as one text, and also reads the weight, labels and flags in the rest.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+)( ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+'
  .. ' streak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=%d+%f[%s%z].*)$'
local function write_grant(load, limit, seq, fence, peak, rest)
  return 'load=' .. load .. ' limit=' .. limit .. ' seq=' .. seq .. ' fence=' .. fence .. ' peak=' .. peak .. rest
end
local function write_lease(id, fence, late, ttl_ms)
  return 'lease instance=' .. id .. ' fence=' .. fence .. (late == '1' and ' late=1 ttl_ms=' or ' ttl_ms=') .. ttl_ms
end
-- Return two sums for the reply to a grant: the loads of all instances, and the capacities of the instances that take
-- work. If another program has written something that is not a whole number into a field, the field counts as 0.
local function sums()
  local found = call('HMGET', STATE, '#load', '#cap')
  local load, cap = match(found[1] or '0', '^%d+$') or '0', match(found[2] or '0', '^%d+$') or '0'
  return #load <= 15 and load + 0 or 0, #cap <= 15 and cap + 0 or 0
end
