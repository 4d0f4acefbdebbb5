-- Counts overdue leases. Needs records.lua, and the key DUE.

local EXPIRIES = 64  -- max due timers that `status` and `sample` process before they count overdue leases

-- Count the leases and grants whose expiry has passed but was not processed yet, among the first 5000 due timers.
local function count_overdue(now_ms)
  local OVERDUE, CHUNK = 5000, 500
  local count = 0
  for at = 0, OVERDUE - CHUNK, CHUNK do
    local some = call('ZRANGEBYSCORE', DUE, '-inf', format('%.0f', now_ms), 'LIMIT', at, CHUNK)
    for _, name in ipairs(some) do
      if string.sub(name, 1, 1) == '@' then count = count + 1 end
    end
    if #some < CHUNK then break end
  end
  return count
end
