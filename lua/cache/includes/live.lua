-- Needs whole_number.lua.

-- Return the parts of a stored entry, or nil if a read of it is a miss: there is no entry, it cannot be read, it was
-- cleared, or one of its tags was invalidated. The second result is whether there is an entry that cannot be read.
-- The parts: version, cost_ms, tags and request (texts), expiry_ms (0 = never), fresh_ms (0 = until it expires), and
-- the positions of the payload, of the key that the entry holds, and of the value.
local function live(call, entry, epochs, TAGS)
  local version, expiry, payload_at, request, cost_ms, fresh, tags, key_at =
    string.match(entry or '', '^(%d+) (%d+) ()(%S+) (%d+) (%d+) (%S*) ()')
  local cleared, tagged, merged = string.match(epochs or '0 0 0', '^(%d+) (%d+) (%d+)$')
  local written, expiry_ms, fresh_ms = whole_number(version), whole_number(expiry), whole_number(fresh)
  if not (written and expiry_ms and fresh_ms and cleared) then return nil, entry and true or false end
  if written <= tonumber(cleared) then return nil, false end
  if tags ~= '' and written <= tonumber(tagged) then
    local newest = tonumber(merged)
    for tag in string.gmatch(tags, '[^,]+') do newest = math.max(newest, tonumber(call('ZSCORE', TAGS, tag) or 0)) end
    if written <= newest then return nil, false end
  end
  local held = tonumber(string.match(request, '~(%d+)$') or 0)
  return {
    version = version, expiry_ms = expiry_ms, request = request, cost_ms = cost_ms, fresh_ms = fresh_ms, tags = tags,
    payload_at = payload_at, key_at = key_at, value_at = key_at + held,
  }, false
end
