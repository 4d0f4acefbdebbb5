-- Whether `labels` include all of `others`. Both are texts as in a record: a,b.
local function has_all(labels, others)
  for label in string.gmatch(others, '[^,]+') do
    if not string.find(',' .. labels .. ',', ',' .. label .. ',', 1, true) then return false end
  end
  return true
end
