-- look: count the holders and waiters of a lock or semaphore, without changing anything.
-- KEYS
--   state  HASH  <tag>:state
--   held   ZSET  <tag>:held
--   queue  ZSET  <tag>:queue
--   <tag> is agentperf:{lock:<name>} or agentperf:{semaphore:<name>}.
-- ARGV
--   token  text  '@' followed by a client's token, or '-' for none
-- RETURNS
--   {held, waiting, left_ms}   held: number of units held; waiting: number of waiters; left_ms: time until the lease of
--                              the token expires, 0 if the token has no lease
-- REPEAT  harmless
-- ERRORS  CORRUPT <key>: the field #fence of the state holds a value that this library did not write
-- COST    O(log L) for L leases
--@include corrupt
--@include whole_number
local STATE, HELD, QUEUE = KEYS[1], KEYS[2], KEYS[3]
local TOKEN = ARGV[1]
--@include lock

local MAX_MS = 86400000
local facts = call('HMGET', STATE, TOKEN, '#fence')
local lock, refused = open_lock(facts[2])
if refused then return refused end
local expiry_ms = tonumber(call('ZSCORE', HELD, TOKEN) or 0)
local is_held = match(facts[1] or '', HELD_RECORD) and expiry_ms > lock.now_ms
return {
  call('ZCOUNT', HELD, '(' .. format('%d', lock.now_ms), '+inf'), call('ZCARD', QUEUE),
  is_held and math.min(expiry_ms - lock.now_ms, MAX_MS) or 0,
}
