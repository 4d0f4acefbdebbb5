-- Deferred deletion: free up to n of the values that clear.lua has left behind. Returns the number of keys examined.
-- Needs index.lua.
local function free_cleared(I, n)
  local version = I.call('LINDEX', I.deferred, 0)
  if not version then I.deferred_count = 0; return 0 end
  local cleared = I.deferred .. ':' .. version
  local keys = redis.pcall('HRANDFIELD', cleared, n)
  if keys.err then                                                     -- the key has another type: it lists no entries
    I.call('UNLINK', cleared)
    keys = {}
  end
  if #keys > 0 then
    local resident, gone = I.call('HMGET', I.size, unpack(keys)), {}
    for i, key in ipairs(keys) do if not resident[i] then gone[#gone + 1] = I.prefix .. key end end
    if #gone > 0 then I.call('UNLINK', unpack(gone)) end
    I.call('HDEL', cleared, unpack(keys))
  end
  if #keys < n then I.call('LPOP', I.deferred); I.deferred_count = I.deferred_count - 1 end
  return #keys
end
