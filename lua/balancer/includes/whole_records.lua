-- Decode and format whole records. In the usual case, acquire and release return before these functions are created.
-- Needs whole_number.lua and records.lua; pool.lua describes all fields.

-- Return the values of all fields of an instance's record, in the order of NAMES, and then the fields of a later
-- version as one text. The fields of the record may be in any order. Returns nil for a record that the library did not
-- write, such as one in which a number is too large.
local function read_record(text)
  local NAMES = 'load limit seq fence peak ewma_us ewma_at_ms served failed streak weight labels flags cap'
  local RECORD = '^load=(%d+) limit=(%d+) seq=(%d+) fence=(%d+) peak=(%d+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) '
    .. 'failed=(%d+) streak=(%d+) weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=(%d+)%f[%s%z](.*)$'
  local load, limit, seq, fence, peak, ewma_us, ewma_at_ms, served, failed, streak, weight, labels, flags, cap,
    later = match(text, RECORD)
  if not load then
    local fields, words, others = {}, {}, ''
    for name, value in string.gmatch(text, '([%a_]+)=(%S+)') do fields[name] = value end
    for name in string.gmatch(NAMES, '%S+') do
      words[#words + 1] = name .. '=' .. (fields[name] or '')
      fields[name] = nil
    end
    for word in string.gmatch(text, '%S+') do
      local name = match(word, '^([%a_]+)=')
      if not name or fields[name] then others = others .. ' ' .. word end
    end
    load, limit, seq, fence, peak, ewma_us, ewma_at_ms, served, failed, streak, weight, labels, flags, cap,
      later = match(table.concat(words, ' ') .. others, RECORD)
    if not load then return nil end
  end
  if #load > 10 or #limit > 10 or #peak > 10 or #cap > 10 or weight + 0 > MAX_WEIGHT then return nil end
  -- The pattern admits only digits in the fields below. So only a number of more than 15 digits may be too large for
  -- `whole_number`. Usually only `fence` is that long.
  if #fence > 15 and not whole_number(fence) or #seq > 15 and not whole_number(seq)
    or #ewma_us > 15 and not whole_number(ewma_us) or #ewma_at_ms > 15 and not whole_number(ewma_at_ms)
    or #served > 15 and not whole_number(served) or #failed > 15 and not whole_number(failed)
    or #streak > 15 and not whole_number(streak) then
    return nil
  end
  return load, limit, seq, fence, peak, ewma_us, ewma_at_ms, served, failed, streak, weight, labels, flags, cap, later
end

-- The next four functions return texts for `state`: the record of a grant that is not fetched yet, the record of a
-- waiter, the value of #pool, and a tombstone. `write_lease` in grants.lua returns the record of a lease.
local function write_granted(id, fence, ticket)
  return 'grant instance=' .. id .. ' fence=' .. fence .. ' ticket=' .. ticket
end
local function write_waiting(ticket, ttl_ms, labels, tokens)
  return 'waiting ticket=' .. ticket .. ' ttl_ms=' .. ttl_ms .. ' labels=' .. labels .. ' tokens=' .. tokens
end
local function write_pool(strategy, slow_after_us)
  return POOL .. strategy .. (slow_after_us ~= '0' and ' slow_after_us=' .. slow_after_us or '')
end
local function write_tombstone(why) return 'tombstone why=' .. why end

local function write_record(r, flags)
  local RECORD = 'load=%d limit=%d seq=%s fence=%d peak=%d ewma_us=%.0f ewma_at_ms=%.0f served=%d failed=%d streak=%d '
    .. 'weight=%s labels=%s flags=%s cap=%d%s'
  return format(RECORD, r.load, r.limit, r.seq, r.fence, r.peak, r.ewma_us, r.ewma_at_ms, r.served, r.failed, r.streak,
    r.weight, r.labels, flags, r.cap, r.later)
end
