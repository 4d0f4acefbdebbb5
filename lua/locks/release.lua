-- release: end a lease on a lock or semaphore, or leave its queue.
-- KEYS
--   state    HASH  <tag>:state
--   held     ZSET  <tag>:held
--   queue    ZSET  <tag>:queue
--   <tag> is agentperf:{lock:<name>} or agentperf:{semaphore:<name>}. The script also writes the STRING
--   <tag>:spent:<token>. It is a tombstone: its text is the reason why the token is refused.
-- ARGV
--   token    text  '@' followed by the client's token
--   bury_ms  int   TTL of a tombstone that refuses a late copy of the acquire request, ms; 0 if no such copy can arrive
--   again    int   1 when another copy of this release may have been executed before, else 0
-- RETURNS
--   1   this call ended the lease or the unfetched grant of the token. If again is 1, an unknown token also gets 1,
--       because an earlier copy probably ended its lease or grant
--   0   the token held no unit: its lease or grant expired, it was waiting, or it is unknown and again is 0
-- REPEAT  harmless: no unit is freed twice
-- ERRORS  CORRUPT <key>: the state holds a value that this library did not write; nothing was written
-- COST    O(log L + log W) for L leases and W waiters. A call ends at most 16 expired leases or grants. Then it handles
--         at most 64 waiters: each gets a unit, or is removed from the queue if it has stopped polling
--@include corrupt
--@include whole_number
local STATE, HELD, QUEUE = KEYS[1], KEYS[2], KEYS[3]
local TOKEN, BURY_MS, AGAIN = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
--@include lock

local facts = call('HMGET', STATE, TOKEN, '#fence')
local lock, refused = open_lock(facts[2])
if refused then return refused end
local expiry_ms = tonumber(call('ZSCORE', HELD, TOKEN) or 0)
local is_held = expiry_ms > lock.now_ms
if is_late(facts[1] or '') then BURY_MS = math.max(BURY_MS, LATE_MS) end
if not facts[1] and expiry_ms == 0 and BURY_MS == 0 then return AGAIN and 1 or 0 end
lock.drop(TOKEN)
if BURY_MS > 0 then
  call('SET', spent_key(TOKEN), is_held and 'released' or 'cancelled', 'PX', format('%d', BURY_MS))
end
lock.expire()
lock.dispatch()
lock.keep()
return (is_held or (AGAIN and not facts[1])) and 1 or 0
