-- The records that acquire and wait read and write to grant a lease. They are not in records.lua, so that release does
-- not create these functions. Needs records.lua; pool.lua describes all fields.

-- The record of an instance, as a grant parses it. A grant changes only fields up to peak. It copies the rest as one
-- text, and reads the weight, labels and flags from it.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+)( ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+'
  .. ' streak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=%d+%f[%s%z].*)$'
local function write_grant(load, limit, seq, fence, peak, rest)
  return 'load=' .. load .. ' limit=' .. limit .. ' seq=' .. seq .. ' fence=' .. fence .. ' peak=' .. peak .. rest
end
local function write_lease(id, fence, late)
  return 'lease instance=' .. id .. ' fence=' .. fence .. (late == '1' and ' late=1' or '')
end
