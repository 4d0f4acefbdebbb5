-- Needs whole_number.lua and header.lua.

-- Return the version of a stored entry, and its computing time as text. Returns nil if a read of the entry is a miss:
-- there is no entry, its header or the epochs cannot be read, the entry was cleared, or one of its tags was or may have
-- been invalidated. The third result is true if there is an entry, but its header or the epochs cannot be read.
-- invalidate_tags.lua explains the epochs.
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
