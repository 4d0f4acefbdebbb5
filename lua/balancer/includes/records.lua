-- The patterns for the records in the hash `state`, and the replies that many scripts share. Needs strategies.lua;
-- pool.lua describes all fields. This file, release.lua, whole_records.lua, grants.lua and pick.lua have patterns that
-- depend on the order of the fields. No other file has such patterns, but acquire.lua writes the first few fields in
-- this order.
--
-- The scripts accept fields in any order, and keep fields of a later minor version. They write the fields in the order
-- that pool.lua lists. In this order, the fields that change most often come first, so that a call can copy the rest of
-- a record without parsing it. A record with fields in another order does not match the usual patterns; `read_record`
-- in whole_records.lua reads it.
--
-- The two scripts that run most often, acquire and release, format whole numbers with '%d', which costs half as much as
-- '%.0f'. '%d' is safe: Lua 5.1 converts the number to a 64-bit long, and no number here exceeds 2^53. acquire and
-- release also concatenate small numbers directly with '..', which is exact below 10^14. Fencing tokens are larger, so
-- they are formatted first. Each outer local variable that a function uses slows down the creation of the function. So
-- a function that is created on every call of a script defines its constants in its own body.
--
-- acquire and release also define the next four names themselves, since they include this file only after the code of
-- their usual case.
local call, match, format, floor = redis.call, string.match, string.format, math.floor

local LEASE, LEASE_TTL = '^lease instance=(%S+) fence=(%d+) ?(l?)', ' ttl_ms=(%d+)'  -- (l?): the first letter of late=1
local GRANTED = '^grant instance=(%S+) fence=(%d+) ticket=(%-?%d+)'
local WAITING = '^waiting ticket=(%-?%d+) ttl_ms=%d+ labels=(%S+) tokens=(%d+)'
local TOMBSTONE = '^tombstone why=(%S+)'

-- A reply begins with its status, which is one of the numbers below; `Status` in replies.py has the same numbers. Many
-- scripts return these refusals:
--   {-3, fact}                     the pool is divided into shards (see layout.lua), or another major version of the
--                                  library wrote #pool. fact: the text of #pool
--   {-4, field}                    this field of the hash `state` has a value that the library did not write. Before
--                                  its first write, a script checks all fields that it needs, so nothing was changed
--   {-7, strategy}                 no row of strategies.lua has this name; nothing was changed
local DONE, NOTHING, SPENT, OTHER_STRATEGY, TOO_LATE, UNKNOWN_STRATEGY = 1, 0, -1, -2, -6, -7

local function corrupt(field) return {-4, field} end

-- Decode the text of #pool. If there is no text, returns a single nil. If the pool is divided or the text is invalid,
-- returns the refusal that the script must return. Otherwise the results are nil, the strategy, its score, pick, waiter
-- and response (see strategies.lua), and the rest of the text after the strategy.
local function opened(fact)
  if not fact then return nil end
  local score, how, waiter, response, strategy = rules(fact)
  if score then return nil, strategy, score, how, waiter, response, '' end  -- usually, nothing follows the strategy
  local pool, more = match(fact, '^(' .. POOL .. '%S+)(.*)$')
  if not pool then return {-3, fact} end
  score, how, waiter, response, strategy = rules(pool)
  if not score then return corrupt('#pool') end
  return nil, strategy, score, how, waiter, response, more
end
