-- The records that a grant reads and writes, for acquire and wait; release does not build these functions. Expects
-- records.lua; the legend of the fields is in pool.lua.

-- What a grant reads of an instance and writes: all that follows peak stays as it is; weight, labels and flags are
-- read from it.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+)( ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+'
  .. ' streak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=%d+%f[%s%z].*)$'
local function write_grant(load, limit, seq, fence, peak, rest)
  return 'load=' .. load .. ' limit=' .. limit .. ' seq=' .. seq .. ' fence=' .. fence .. ' peak=' .. peak .. rest
end
local function write_lease(id, fence, late)
  return 'lease instance=' .. id .. ' fence=' .. fence .. (late == '1' and ' late=1' or '')
end
