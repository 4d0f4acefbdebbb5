-- The records of state, read and written: this file and whole_records.lua alone know the order of their fields. Expects
-- strategies.lua. The legend of the fields is in pool.lua. Fields may come in any order, and fields of a later minor
-- version are kept. The patterns below are the order in which the fields are written: those that change most often come
-- first, so that a call copies the others without a look. A record that does not match is left to `read_record` in
-- whole_records.lua, which takes any order.
--
-- Scripts that run at every call write whole numbers with '%d', at half the cost of '%.0f': Lua 5.1 makes a long of
-- them, which has 64 bits, and none of ours passes 2^53. They join texts with '..', at a third of the cost of '%s'; a
-- number may be joined so when it is below 10^14, and a fencing token, which is above, is given as text.
local call, match, format, floor = redis.call, string.match, string.format, math.floor

-- The fields that a grant reads and writes. All after peak stays unchanged; it contains weight, labels and flags.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+)( ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+'
  .. ' streak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) cap=%d+%f[%s%z].*)$'
local function write_grant(load, limit, seq, fence, peak, rest)
  return 'load=' .. load .. ' limit=' .. limit .. ' seq=' .. seq .. ' fence=' .. fence .. ' peak=' .. peak .. rest
end
-- The fields that a release reads and writes; limit, seq, fence and peak stay, and it needs the first two of them.
local RELEASE = '^load=(%d+) (limit=(%d+) seq=(%d+) %S+ %S+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) '
  .. 'failed=(%d+) streak=(%d+)( .*)$'
local function write_release(load, same, ewma_us, ewma_at_ms, served, failed, streak, rest)
  return 'load=' .. load .. ' ' .. same .. ' ewma_us=' .. ewma_us .. ' ewma_at_ms=' .. ewma_at_ms .. ' served=' .. served
    .. ' failed=' .. failed .. ' streak=' .. streak .. rest
end
-- Most instances have neither labels nor flags; a search for this text is the fastest way to tell.
local PLAIN = ' labels=- flags=- cap='
local LOADED = '^load=(%d+) limit=(%d+) '
local PRICED = '^load=(%d+) limit=%S+ %S+ %S+ %S+ ewma_us=(%d+) ewma_at_ms=(%d+) '
local LEASE, GRANTED = '^lease instance=(%S+) fence=(%d+) late=(%d)', '^grant instance=(%S+) fence=(%d+) ticket=(%S+)'
local WAITING = '^waiting ticket=(%S+) ttl_ms=%d+ labels=(%S+) tokens=(%d+)'
local TOMBSTONE = '^tombstone why=(%S+)'
local function write_lease(id, fence, late) return 'lease instance=' .. id .. ' fence=' .. fence .. ' late=' .. late end
local POOL_START, POOL, SLOW_AFTER = 'schema=2 strategy=', '^schema=2 strategy=(%S+)(.*)$', ' slow_after_us=(%d+)'

-- The status that every reply begins with; Status in replies.py.
--   {OTHER_SCHEMA, fact}           #pool as it is: another major version of the library wrote it
--   {CORRUPT, field}               a field of state that the library did not write. Scripts check the fields they
--                                  need before their first write, so nothing was changed
--   {UNKNOWN_STRATEGY, strategy}   no row of strategies.lua has this name; nothing was changed
local DONE, NOTHING, SPENT, OTHER_STRATEGY, OTHER_SCHEMA = 1, 0, -1, -2, -3
local CORRUPT, TOO_LATE, UNKNOWN_STRATEGY = -4, -6, -7

local function corrupt(field) return {CORRUPT, field} end

-- Read #pool. Returns the reply that refuses it, nil when it is good or missing; then the strategy and what follows it.
local function opened(fact)
  if not fact then return nil end
  if string.sub(fact, 1, 18) == POOL_START then  -- the usual case: nothing follows the strategy
    local strategy = string.sub(fact, 19)
    if rules(strategy) then return nil, strategy, '' end
  end
  local strategy, more = match(fact, POOL)
  if not strategy then return {OTHER_SCHEMA, fact} end
  if not rules(strategy) then return corrupt('#pool') end
  return nil, strategy, more
end

-- One field of a record, wherever it stands; nil when it is missing.
local function field(record, name)
  local _, at = string.find(' ' .. record, ' ' .. name .. '=', 1, true)
  return at and match(record, '^%S+', at)
end

-- Whether a counter is a whole number, or missing.
local function whole(text) return not text or (#text <= 16 and match(text, '^%-?%d+$')) end
