-- wait: stand in line for a lease, keep the place, and fetch what was handed over. Called again and again.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   token     text  @ and the client's token
--   ttl_ms    int   life of the lease once fetched, ms
--   live_ms   int   silence after which the place is lost, ms
--   boost_ms  int   how much earlier than now it counts as having come, by its priority, ms
--   labels    text  a,b the instance must have all of; - for none
--   place     text  the place held before, or - to take one at the end of the line
--   tokens    int   counted against the instance's tokens a minute
-- RETURNS
--   {1, id, expiry_ms, fence, record}   granted, or the same grant again
--   {0, ahead, poll_ms, place}          in line; ahead: how many are before it; poll_ms: until capacity may come back, at most 1000
--   {-1, why}                           the token is spent: r e c as in pool.lua
--   {-3, fact}  {-4, field}   other schema; a field we did not write
-- REPEAT  the same place, or the same lease
-- ERRORS  none
-- COST    O(log W + log N), at most 16 expiries and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, TTL_MS, LIVE_MS, BOOST_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local LABELS, PLACE, TOKENS = ARGV[5], ARGV[6], ARGV[7]
--@include pool
--@include health
--@include maintenance

local EXPIRIES = 16
local pool = call('HGET', STATE, '#pool')
if pool and not match(pool, POOL) then return {OTHER_SCHEMA, pool} end
if LABELS ~= '-' then check(LABELS) end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep()
all.reap(EXPIRIES)

local known = call('HGET', STATE, TOKEN)
if not known or known == 'X u' then
  -- New, or what it was granted was not fetched in time: then it has its old place again.
  local place = PLACE ~= '-' and PLACE or format('%.0f', all.now_us - BOOST_MS * 1000)
  known = 'W ' .. place .. ' ' .. TTL_MS .. ' ' .. LABELS .. ' ' .. TOKENS
  call('HSET', STATE, TOKEN, known)
  call('ZREM', DUE, 'X' .. TOKEN)
  call('ZADD', WAITQ, place, TOKEN)
else
  call('ZREM', DUE, '')  -- removes nothing: who is in line already keeps the place at maxmemory too
end
if string.sub(known, 1, 1) == 'W' then
  call('ZADD', DUE, format('%.0f', all.now_ms + LIVE_MS), 'W' .. TOKEN)
end
all.pump()

known = call('HGET', STATE, TOKEN)
local kind, id, fence = match(known, '^(%a) (%S+) ?(%S*)')
local expiry_ms
if kind == 'G' then
  -- Fetched. Other copies of this request may be under way, hence the mark 1: its release will be remembered.
  expiry_ms = all.now_ms + TTL_MS
  call('HSET', STATE, TOKEN, 'L ' .. id .. ' ' .. fence .. ' 1')
  call('ZADD', DUE, format('%.0f', expiry_ms), TOKEN)
elseif kind == 'L' then
  expiry_ms = tonumber(call('ZSCORE', DUE, TOKEN) or 0)
end
all.retime()
if kind == 'X' then return {SPENT, id} end
if kind == 'W' then
  return {NOTHING, call('ZRANK', WAITQ, TOKEN), respite(all.now_ms), match(known, '^W (%S+)')}
end
if expiry_ms <= all.now_ms then return {SPENT, 'e'} end
return {DONE, id, expiry_ms, tonumber(fence), call('HGET', STATE, id) or ''}
