-- leases: return one page of a pool's leases and waiters, without changing anything.
-- KEYS
--   state  HASH  agentperf:{lb:<type>}:state
--   due    ZSET  agentperf:{lb:<type>}:due
-- ARGV
--   first  int   rank of the first timer of the page in the sorted set due
--   count  int   timers per page, at most 1000; the reply contains only timers of leases, unfetched grants and waiters
-- RETURNS
--   {1, now_ms, next_rank, token, record, due_ms, token, record, due_ms ...}
--     next_rank: rank of the first timer of the next page, 0 after the last page. due_ms: when the lease or grant
--     expires, or when the waiter loses its position. The tokens are sorted by due_ms
--   {0}   no such pool
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: it changes nothing
-- ERRORS  none
-- COST    O(log L + count) for L timers
local STATE, DUE = KEYS[1], KEYS[2]
local FIRST, COUNT = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records

local fact = call('HGET', STATE, '#pool')
if not fact then return {NOTHING} end
local refused = opened(fact)
if refused then return refused end
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
local page = call('ZRANGE', DUE, FIRST, FIRST + COUNT - 1, 'WITHSCORES')
local total, read = call('ZCARD', DUE), #page / 2
local reply = {DONE, now_ms, FIRST + read < total and read > 0 and FIRST + read or 0}
local tokens, ends = {}, {}
for i = 1, #page, 2 do
  local token = match(page[i], '^W?(@.*)$')
  if token then
    tokens[#tokens + 1] = token
    ends[#ends + 1] = page[i + 1]
  end
end
if #tokens > 0 then
  for i, record in ipairs(call('HMGET', STATE, unpack(tokens))) do
    reply[#reply + 1] = tokens[i]
    reply[#reply + 1] = record or ''
    reply[#reply + 1] = ends[i]
  end
end
return reply
