-- extend: renew a lease on a lock or semaphore, or add time to it.
-- KEYS
--   state   HASH  <tag>:state
--   held    ZSET  <tag>:held
--   queue   ZSET  <tag>:queue
--   <tag> is agentperf:{lock:<name>} or agentperf:{semaphore:<name>}.
-- ARGV
--   token   text  '@' followed by the client's token
--   ttl_ms  int   if added is 0: new TTL of the lease, counted from now, ms. Otherwise: time to add to the time that is
--                 left, ms
--   added   int   0: replace the TTL. Otherwise: number of the addition. Each addition to a lease has a different
--                 number, but all copies of a request have the same number
-- RETURNS
--   {1, left_ms}   extended; left_ms: time until the lease expires
--   {0}            there is no lease: it expired, was released or was never granted
-- REPEAT  a copy of the last addition adds nothing. With added = 0, the TTL counts from the latest call, so a late copy
--         renews the lease again
-- ERRORS  CORRUPT <key>: the state holds a value that this library did not write; nothing was written
-- COST    O(log L) for L leases
--@include corrupt
--@include whole_number
local STATE, HELD, QUEUE = KEYS[1], KEYS[2], KEYS[3]
local TOKEN, TTL_MS, ADDED = ARGV[1], tonumber(ARGV[2]), ARGV[3]
--@include lock

local MAX_MS = 86400000
local facts = call('HMGET', STATE, TOKEN, '#fence')
local lock, refused = open_lock(facts[2])
if refused then return refused end
local expiry_ms = tonumber(call('ZSCORE', HELD, TOKEN) or 0)
local fence, _, late = match(facts[1] or '', HELD_RECORD)
if not fence or expiry_ms <= lock.now_ms then return {0} end
if not whole_number(fence) then return corrupt(STATE, 'a fencing token that is no number') end
local left_ms, last = TTL_MS, match(facts[1], ADDED_LAST)
if ADDED ~= '0' then
  left_ms = expiry_ms - lock.now_ms
  if ADDED ~= last then left_ms, last = left_ms + TTL_MS, ADDED end
end
left_ms = math.min(MAX_MS, left_ms)
local text = format('%d', left_ms)
call('ZREM', HELD, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
call('HSET', STATE, TOKEN, write_held(fence, text, late ~= '', last))
call('ZADD', HELD, format('%d', lock.now_ms + left_ms), TOKEN)
lock.keep()
return {1, left_ms}
