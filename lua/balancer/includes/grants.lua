-- The pattern and the function for granting a lease; pool.lua describes all fields.

-- Matches the record of an instance that gets a lease. The usual grant changes no field after peak. It copies the
-- fields after peak as one text, and also reads three of them: weight, labels and flags.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+)( ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+'
  .. ' streak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=%d+%f[%s%z].*)$'
local function write_lease(id, fence, late, ttl_ms)
  return 'lease instance=' .. id .. ' fence=' .. fence .. (late == '1' and ' late=1 ttl_ms=' or ' ttl_ms=') .. ttl_ms
end
