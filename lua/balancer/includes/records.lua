-- The records of state, read and written: the only Lua file that knows the order of their fields. Expects strategies.lua.
-- The legend of the fields is in pool.lua. Fields may come in any order, and fields of a later minor version are kept; the
-- patterns below are the order in which they are written, which is quick to read. A pattern that does not match leaves
-- the record to `read_record`, which takes any order.
--
-- Scripts that run at every call write whole numbers with '%d', at half the cost of '%.0f': Lua 5.1 makes a long of them,
-- which has 64 bits, and none of ours passes 2^53.
local call, match, format, floor = redis.call, string.match, string.format, math.floor

-- What a grant reads and writes of an instance:   load, limit, fence, peak, the rest, and of the rest weight, labels, flags.
local GRANT = '^load=(%d+) limit=(%d+) seq=%d+ fence=(%d+) peak=(%d+) (weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) '
  .. 'cap=%d+ ewma_us=%d+ ewma_at_ms=%d+ served=%d+ failed=%d+ bad_streak=%d+%f[%s%z].*)$'
local GRANT_WRITTEN = 'load=%d limit=%d seq=%s fence=%d peak=%d %s'
-- What a release reads and writes: load, what stays, and of that limit, seq, weight, labels, flags; then the rest by name.
local RELEASE = '^load=(%d+) (limit=(%d+) seq=(%d+) fence=%d+ peak=%d+ weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) '
  .. 'cap=%d+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) failed=(%d+) bad_streak=(%d+)%f[%s%z](.*)$'
local RELEASE_WRITTEN = 'load=%d %s ewma_us=%s ewma_at_ms=%s served=%s failed=%s bad_streak=%s%s'
local LOADED = '^load=(%d+) limit=(%d+) '
local PRICED = '^load=(%d+) limit=%S+ %S+ %S+ %S+ %S+ %S+ %S+ cap=%S+ ewma_us=(%d+) ewma_at_ms=(%d+) '
local LEASE, GRANTED = '^lease instance=(%S+) fence=(%d+) late=(%d)', '^grant instance=(%S+) fence=(%d+) ticket=(%S+)'
local LEASE_WRITTEN, GRANTED_WRITTEN = 'lease instance=%s fence=%d late=%s', 'grant instance=%s fence=%d ticket=%s'
local WAITING = '^waiting ticket=(%S+) ttl_ms=%d+ labels=(%S+) tokens=(%d+)'
local WAITING_WRITTEN = 'waiting ticket=%s ttl_ms=%s labels=%s tokens=%s'
local TOMBSTONE, TOMBSTONE_WRITTEN = '^tombstone why=(%S+)', 'tombstone why=%s'
local POOL, POOL_WRITTEN, SLOW_AFTER = '^schema=2 strategy=(%S+)(.*)$', 'schema=2 strategy=%s', ' slow_after_us=(%d+)'

-- The status that every reply begins with; Status in replies.py.
--   {OTHER_SCHEMA, fact}           #pool as it is: another major version of the library wrote it
--   {CORRUPT, field}               the field of state that holds something the library did not write. Scripts look at what
--                                  they need before their first write, so nothing was changed
--   {UNKNOWN_STRATEGY, strategy}   no row of STRATEGIES has this name; nothing was changed
local DONE, NOTHING, SPENT, OTHER_STRATEGY, OTHER_SCHEMA, CORRUPT, TOO_LATE, UNKNOWN_STRATEGY = 1, 0, -1, -2, -3, -4, -6, -7

local function corrupt(field) return {CORRUPT, field} end

-- Read #pool. Returns the reply that refuses it, nil when it is good or missing; then the strategy and what follows it.
local function opened(fact)
  if not fact then return nil end
  local strategy, more = match(fact, POOL)
  if not strategy then return {OTHER_SCHEMA, fact} end
  if not STRATEGIES[strategy] then return corrupt('#pool') end
  return nil, strategy, more
end

-- One field of a record, wherever it stands; nil when it is missing.
local function field(record, name)
  local _, at = string.find(' ' .. record, ' ' .. name .. '=', 1, true)
  return at and match(record, '^%S+', at)
end

-- Whether a counter is a whole number, or missing.
local function whole(text) return not text or (#text <= 16 and match(text, '^%-?%d+$')) end

-- All fields of an instance's record, those of a later version last as one text; nil when the library did not write it.
-- A record in another order than it is written in is put into that order first.
local function read_record(text)
  local NAMES = 'load limit seq fence peak weight labels flags cap ewma_us ewma_at_ms served failed bad_streak'
  local RECORD = '^load=(%d+) limit=(%d+) seq=(%d+) fence=(%d+) peak=(%d+) weight=(%d+%.?%d*) labels=(%S+) flags=(%S+) '
    .. 'cap=(%d+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) failed=(%d+) bad_streak=(%d+)%f[%s%z](.*)$'
  local values = {match(text, RECORD)}
  if not values[1] then
    local fields, words, later = {}, {}, ''
    for name, value in string.gmatch(text, '([%a_]+)=(%S+)') do fields[name] = value end
    for name in string.gmatch(NAMES, '%S+') do
      words[#words + 1] = name .. '=' .. (fields[name] or '')
      fields[name] = nil
    end
    for word in string.gmatch(text, '%S+') do
      local name = match(word, '^([%a_]+)=')
      if not name or fields[name] then later = later .. ' ' .. word end
    end
    values = {match(table.concat(words, ' ') .. later, RECORD)}
  end
  return unpack(values)
end

local function write_record(r, flags)
  local RECORD = 'load=%d limit=%d seq=%s fence=%d peak=%d weight=%s labels=%s flags=%s '
    .. 'cap=%d ewma_us=%.0f ewma_at_ms=%.0f served=%d failed=%d bad_streak=%d%s'
  return format(RECORD, r.load, r.limit, r.seq, r.fence, r.peak, r.weight, r.labels, flags, r.cap, r.ewma_us, r.ewma_at_ms,
    r.served, r.failed, r.bad_streak, r.later)
end
