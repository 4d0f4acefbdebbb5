-- Delete expired entries. Needs whole_number.lua and index.lua. Call this function only if I.next has passed: before
-- that time, no entry has expired. In a small cache, all residents are examined. In a larger cache, only some calls
-- examine residents, about 16 each: a random sample, or the next ones in the order of HSCAN.
local function expire(I)
  -- If the cache has at most SMALL entries, each write removes all expired entries. If it has at most LISTPACK entries,
  -- the server may store the hash SIZE as a listpack. HSCAN returns all fields of a listpack at once, so HRANDFIELD is
  -- used instead.
  local call, found, SMALL, LISTPACK = I.call, 0, 32, 512
  if I.n <= SMALL then
    local first_ms = nil
    for _, key in ipairs(call('HRANDFIELD', I.size, SMALL)) do       -- this returns all fields
      local left_ms = call('PTTL', I.prefix .. key)
      if left_ms == -2 then I.remove(key); found = found + 1
      elseif left_ms >= 0 then first_ms = math.min(first_ms or 8e15, I.now_ms + left_ms) end
    end
    I.next = first_ms
  else
    -- The clock decides whether this write examines residents. A separate counter would have to be stored at each
    -- write.
    if I.clock % 16 > 0 and string.sub(I.scan or '', -1) ~= '+' then return end
    local cursor = string.match(I.scan or '', '^%d+')
    local at, keys, values, gone = whole_number(cursor) and cursor or '0', {}, {}, {}
    if I.n <= LISTPACK then keys = call('HRANDFIELD', I.size, 16)
    else
      local page = call('HSCAN', I.size, at, 'COUNT', 16)
      at = page[1]
      for i = 1, #page[2], 2 do keys[#keys + 1] = page[2][i] end
    end
    for i = 1, #keys do values[i] = I.prefix .. keys[i] end
    for first = 1, #keys, 256 do         -- `unpack` has a limit
      local last = math.min(#keys, first + 255)
      if call('EXISTS', unpack(values, first, last)) <= last - first then
        for i = first, last do
          if not gone[keys[i]] and call('EXISTS', values[i]) == 0 then
            gone[keys[i]] = true         -- HSCAN may return a field twice
            I.remove(keys[i])
            found = found + 1
          end
        end
      end
    end
    I.scan = at .. (found > 0 and ' +' or '')
  end
  I.delete_dropped()
  I.expired = I.expired + found
end
