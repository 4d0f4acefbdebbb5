-- The records of state, read and written. This file, whole_records.lua and grants.lua know the order of all fields, and
-- pick.lua that of the first ones; no other file does. Expects strategies.lua. The legend of the fields is in pool.lua.
--
-- Fields may come in any order, and fields of a later minor version are kept. The patterns are the order in which the
-- fields are written: those that change most often come first, so that a call copies the others without a look. A
-- record that does not match is left to `read_record` in whole_records.lua, which takes any order.
--
-- Scripts that run at every call write whole numbers with '%d', at half the cost of '%.0f': Lua 5.1 makes a long of
-- them, which has 64 bits, and none of ours passes 2^53. They join texts with '..'. A number may be joined so when it
-- is below 10^14; a fencing token is above, and is given as text. A function that every call builds has its constants
-- inside: each local from outside that it names has to be built with it.
local call, match, format, floor = redis.call, string.match, string.format, math.floor

-- The fields that a release reads and writes; limit, seq, fence and peak stay, and it needs the first two of them.
local RELEASE = '^load=(%d+) (limit=(%d+) seq=(%d+) %S+ %S+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) '
  .. 'failed=(%d+) streak=(%d+)( .*)$'
local function write_release(load, same, ewma_us, ewma_at_ms, served, failed, streak, rest)
  return 'load=' .. load .. ' ' .. same .. ' ewma_us=' .. ewma_us .. ' ewma_at_ms=' .. ewma_at_ms
    .. ' served=' .. served .. ' failed=' .. failed .. ' streak=' .. streak .. rest
end
-- Most instances have neither labels nor flags; a search for this text is the fastest way to tell.
local PLAIN = ' labels=- flags=- cap='
local PLAIN_WEIGHT = '^ weight=(%d+%.?%d*) labels=%- flags=%- cap='
local LEASE, GRANTED = '^lease instance=(%S+) fence=(%d+)(.*)$', '^grant instance=(%S+) fence=(%d+) ticket=(%S+)'
local WAITING = '^waiting ticket=(%S+) ttl_ms=%d+ labels=(%S+) tokens=(%d+)'
local TOMBSTONE = '^tombstone why=(%S+)'
local SLOW_AFTER = ' slow_after_us=(%d+)'

-- The status that every reply begins with; Status in replies.py.
--   {-3, fact}                     #pool as it is: another major version of the library wrote it
--   {-4, field}                    a field of state that the library did not write. Scripts check the fields they
--                                  need before their first write, so nothing was changed
--   {UNKNOWN_STRATEGY, strategy}   no row of strategies.lua has this name; nothing was changed
local DONE, NOTHING, SPENT, OTHER_STRATEGY, TOO_LATE, UNKNOWN_STRATEGY = 1, 0, -1, -2, -6, -7

local function corrupt(field) return {-4, field} end

-- Read #pool. Returns the reply that refuses it, nil when it is good or missing; then the strategy, its score, pick,
-- waiter and response, and what follows it.
local function opened(fact)
  if not fact then return nil end
  if string.sub(fact, 1, 18) == 'schema=2 strategy=' then  -- the usual case: nothing follows the strategy
    local strategy = string.sub(fact, 19)
    local score, how, waiter, response = rules(strategy)
    if score then return nil, strategy, score, how, waiter, response, '' end
  end
  local strategy, more = match(fact, '^schema=2 strategy=(%S+)(.*)$')
  if not strategy then return {-3, fact} end
  local score, how, waiter, response = rules(strategy)
  if not score then return corrupt('#pool') end
  return nil, strategy, score, how, waiter, response, more
end

-- One field of a record, wherever it stands; nil when it is missing.
local function field(record, name)
  local _, at = string.find(' ' .. record, ' ' .. name .. '=', 1, true)
  return at and match(record, '^%S+', at)
end

-- Whether a counter is a whole number, or missing.
local function whole(text) return not text or (#text <= 16 and match(text, '^%-?%d+$')) end
