-- Needs whole_number.lua and header.lua.

-- Return the version of a stored entry, and its computing time as text. Returns nil if the entry counts as a miss. An
-- entry counts as a miss if it does not exist, if its header or the epochs cannot be read, if it was cleared, or if one
-- of its tags was (or may have been) invalidated. The third result is true if the entry exists, but its header or the
-- epochs cannot be read. invalidate_tags.lua explains the epochs.
local function live(call, entry, epochs, TAGS)
  local written, _, _, cost_ms, _, tags = read_header(entry)
  local cleared, tagged, merged = string.match(epochs or '0 0 0', '^(%d+) (%d+) (%d+)$')
  if not (written and cleared) then return nil, nil, entry and true end
  if written <= tonumber(cleared) then return nil end
  if tags ~= '' and written <= tonumber(tagged) then
    local newest = tonumber(merged)
    for tag in string.gmatch(tags, '[^,]+') do newest = math.max(newest, tonumber(call('ZSCORE', TAGS, tag) or 0)) end
    if written <= newest then return nil end
  end
  return written, cost_ms
end
