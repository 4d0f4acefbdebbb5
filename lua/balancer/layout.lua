-- layout: divide a pool into shards, confirm the division, let it expire, or end it.
-- A divided pool still has the hash `state`. There, #pool holds the number of shards and the strategy, and #settings
-- holds the settings. If another script finds a number of shards in #pool, it refuses the request. The caller then uses
-- the keys of the shards.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   action    text  'set': divide the pool, or confirm its division. 'lapse': let the division expire in a day, unless
--                   a 'set' confirms it before then. 'drop': end the division now, but keep the creation time of the
--                   pool (#born) for a minute
--   shards    int   for 'set': the wanted number of shards, 1 for an undivided pool. For 'lapse' and 'drop': the
--                   present number
--   wanted    text  strategy that the pool must have; '-': any strategy, or least_loaded for a new pool
--   settings  text  settings of the pool, see pool.lua
--   chosen    int   1 when the settings replace those of an existing pool, else 0
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   {1, shards, strategy, settings, before}   done. strategy: the strategy of the pool. settings: the settings of the
--     pool after a 'set', else empty. before: the settings that were replaced, empty if none were
--   {0, shards}       not done. shards: the number of shards that the pool has now, 1 if it is not divided. Nothing was
--     changed, with one exception: if the division is expiring after a 'lapse', a 'set' to 1 shard ends the division
--     and returns {0, 1}
--   {-2, strategy}    the pool has another strategy
--   {-3, fact}  {-4, field}  {-7, strategy}   as in records.lua
--   {-6, now_ms}      the request came after until_ms; nothing was changed
-- REPEAT  results in the same state; a copy that arrives after until_ms is refused, since it could undo a later change
-- ERRORS  none
-- COST    O(1): at most 20 commands. The server frees the memory of deleted keys in the background
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local ACTION, SHARDS, WANTED, SETTINGS, CHOSEN, UNTIL_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
--@include strategies
--@include whole_number
--@include records

local LAPSE_MS, MARKED_MS = '86400000', '60000'  -- MARKED_MS as in delete.lua
local TAG = string.sub(READY, 1, -6)
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
if UNTIL_MS ~= '0' and now_ms > tonumber(UNTIL_MS) then return {TOO_LATE, now_ms} end
local known = call('HMGET', STATE, '#pool', '#settings', '#load', '#born')
local registered = call('ZCARD', IDS)
local shards, strategy = match(known[1] or '', '^shards=(%d+) strategy=(%S+)$')
if shards and (not rules(POOL .. strategy) or not whole_number(shards)) then return corrupt('#pool') end
if WANTED ~= '-' and not rules(POOL .. WANTED) then return {UNKNOWN_STRATEGY, WANTED} end
if not shards then
  local refused = opened(known[1])
  if refused then return refused end
  local load = whole_number(known[3], 0)
  if not load then return corrupt('#load') end
  -- The pool is not divided yet. It can be divided only while it has no instances and no leases.
  if ACTION ~= 'set' or SHARDS == '1' or registered > 0 or load > 0 then return {NOTHING, 1} end
elseif shards ~= SHARDS then
  if ACTION ~= 'set' or call('PTTL', STATE) == -1 then return {NOTHING, tonumber(shards)} end
  if SHARDS == '1' then  -- the division is expiring, because the caller of 'lapse' found no instance in any shard
    call('HDEL', STATE, '#pool', '#settings')
    return {NOTHING, 1}
  end
end
if ACTION == 'drop' then
  call('HDEL', STATE, '#pool', '#settings')
  call('PEXPIRE', STATE, MARKED_MS)  -- has an effect only if #born is left in the hash
  return {DONE, tonumber(shards), strategy, '', ''}
elseif ACTION == 'lapse' then
  call('PEXPIRE', STATE, LAPSE_MS)
  return {DONE, tonumber(shards), strategy, '', ''}
end
local before, settings = '', known[2]
local is_kept = shards and call('PTTL', STATE) == -1
if is_kept then
  if WANTED ~= '-' and WANTED ~= strategy then return {OTHER_STRATEGY, strategy} end
elseif WANTED ~= '-' or not strategy then  -- the pool has no instance, so its strategy may change
  strategy = WANTED ~= '-' and WANTED or DEFAULT_STRATEGY
end
if not settings or (CHOSEN == '1' and settings ~= SETTINGS) then before, settings = settings or '', SETTINGS end
if not shards then
  -- The undivided pool may have waiters, although it has no instances. These waiters queue again in the shards.
  for _, key in ipairs({STATE, READY, DUE, WAITQ, IDS, RING}) do call('UNLINK', key) end
  for _, part in ipairs({'away', 'checks', 'events', 'history'}) do call('UNLINK', TAG .. part) end
  if known[4] then call('HSET', STATE, '#born', known[4]) end
end
if not is_kept or settings ~= known[2] then
  call('HSET', STATE, '#pool', 'shards=' .. SHARDS .. ' strategy=' .. strategy, '#settings', settings)
  call('PERSIST', STATE)
end
return {DONE, tonumber(SHARDS), strategy, settings, before}
