-- Return whether `labels` contains all names in `others`. Both are comma-separated names, as in a record.
local function has_all(labels, others)
  for label in string.gmatch(others, '[^,]+') do
    if not string.find(',' .. labels .. ',', ',' .. label .. ',', 1, true) then return false end
  end
  return true
end
