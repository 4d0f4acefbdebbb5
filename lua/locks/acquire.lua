-- acquire: take one unit of a lock or semaphore, at most once per token. A waiter repeats the call: the first call
-- joins the queue, and later calls keep the waiter in the queue and fetch its grant.
-- KEYS
--   state    HASH  <tag>:state
--   held     ZSET  <tag>:held
--   queue    ZSET  <tag>:queue
--   <tag> is agentperf:{lock:<name>} or agentperf:{semaphore:<name>}. The script also reads and writes the STRING
--   <tag>:spent:<token>. It is a tombstone: its text is the reason why the token is refused.
-- ARGV
--   token    text  '@' followed by the client's token
--   ttl_ms   int   TTL of the lease, ms
--   limit    int   the request is granted only if fewer units than this number are held; 1 for a lock
--   late     int   1 when another copy of this request may still arrive, else 0
--   live_ms  int   time without a call after which the waiter loses its position, ms; 0: do not queue
--   ticket   text  the waiter's ticket from an earlier reply, or '-' for a new ticket
-- RETURNS
--   {1, fence, left_ms}             the token holds a unit, taken now or before; left_ms: time until the lease expires
--   {0, ahead, retry_ms, ticket}    not granted; ahead: number of waiters before this one; retry_ms: time until a lease
--                                   may expire, at most 1000; ticket: the waiter's ticket, '-' if it did not queue
--   {-1, why}                       the token is spent; why: 'expired', 'released', 'cancelled' or 'refused'
-- REPEAT  a copy returns the same lease or the same ticket, unless it is refused. It is refused if the token was
--         cancelled, if the lease expired, or if the release left a tombstone. It is also refused if an earlier copy
--         with late = 1 found no free unit and did not queue
-- ERRORS  CORRUPT <key>: the state or the queue holds a value that this library did not write; nothing was written
-- COST    O(log L + log W) for L leases and W waiters. A call ends at most 16 expired leases or grants. Then it handles
--         at most 64 waiters: each gets a unit, or is removed from the queue if it has stopped polling
--@include corrupt
--@include whole_number
local STATE, HELD, QUEUE = KEYS[1], KEYS[2], KEYS[3]
local TOKEN, TTL_MS, LIMIT = ARGV[1], ARGV[2], tonumber(ARGV[3])
local LATE, LIVE_MS, TICKET = ARGV[4] == '1', tonumber(ARGV[5]), ARGV[6]
--@include lock

local facts = call('HMGET', STATE, TOKEN, '#fence')
local why = call('GET', spent_key(TOKEN))
local expiry_ms = tonumber(call('ZSCORE', HELD, TOKEN) or 0)
local lock, refused = open_lock(facts[2])
if refused then return refused end
if why then return {-1, why} end
local fence = match(facts[1] or '', HELD_RECORD)
local late = LATE or is_late(facts[1] or '')
if fence then
  fence = whole_number(fence)
  if not fence then return corrupt(STATE, 'a fencing token that is no number') end
  if expiry_ms <= lock.now_ms then return {-1, 'expired'} end
  if late and not is_late(facts[1]) then
    call('HSET', STATE, TOKEN, write_held(format('%d', fence), TTL_MS, true, match(facts[1], ADDED_LAST)))
  end
  return {1, fence, math.min(expiry_ms - lock.now_ms, tonumber(TTL_MS))}
end
local ticket, granted = match(facts[1] or '', WAITING), match(facts[1] or '', GRANTED)
if facts[1] and not ticket and not granted then
  return corrupt(STATE, 'a record of a request that this library did not write')
end
ticket = ticket or TICKET
if granted and not whole_number(granted) then return corrupt(STATE, 'a fencing token that is no number') end
if ticket ~= '-' and not whole_number(ticket) then return corrupt(STATE, 'a ticket that is no number') end
local queued, last = call('ZSCORE', QUEUE, TOKEN), call('ZRANGE', QUEUE, -1, -1, 'WITHSCORES')[2]
if (queued and not whole_number(queued)) or not whole_number(last, 0) then
  return corrupt(QUEUE, 'a ticket that is no number')
end

call('ZREM', HELD, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
if granted and expiry_ms <= lock.now_ms then lock.drop(TOKEN) end  -- the grant was not fetched in time
lock.expire()
if call('ZCARD', HELD) >= LIMIT then lock.correct() end
if LIVE_MS > 0 and not (granted and expiry_ms > lock.now_ms) then
  if queued then
    ticket = queued
  elseif ticket == '-' then
    -- Each waiter gets a higher ticket than the waiter before it, even if the server's clock was set back.
    ticket = format('%d', math.max(lock.now_us, (last or 0) + 1))
  end
  call('ZADD', QUEUE, 'NX', ticket, TOKEN)
  local record = 'waiting ticket=' .. ticket .. ' limit=' .. format('%d', LIMIT)
    .. ' live_ms=' .. format('%d', lock.now_ms + LIVE_MS)
  call('HSET', STATE, TOKEN, record .. (late and ' late=1' or ''))
end
lock.dispatch()
granted = match(call('HGET', STATE, TOKEN) or '', GRANTED)
if granted then  -- this call fetches the grant
  call('HSET', STATE, TOKEN, write_held(granted, TTL_MS, late))
  call('ZADD', HELD, format('%d', lock.now_ms + TTL_MS), TOKEN)
elseif LIVE_MS == 0 and call('ZCARD', QUEUE) == 0 and call('ZCARD', HELD) < LIMIT then
  granted = lock.take(TOKEN, TTL_MS, function(text) return write_held(text, TTL_MS, late) end)
end
lock.keep()
if granted then return {1, tonumber(granted), tonumber(TTL_MS)} end
if LATE and LIVE_MS == 0 then  -- the caller goes on without a unit, so a copy that arrives later must not take one
  call('SET', spent_key(TOKEN), 'refused', 'PX', format('%d', LATE_MS))
end
local ahead = LIVE_MS > 0 and call('ZRANK', QUEUE, TOKEN) or call('ZCARD', QUEUE)
return {0, ahead, lock.retry_ms(), LIVE_MS > 0 and ticket or '-'}
