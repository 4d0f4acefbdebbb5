-- wait: join the queue for a lease, stay in the queue, or fetch the grant. A waiter repeats the call until it has a
-- lease.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   token     text  '@' followed by the client's token
--   ttl_ms    int   TTL of the lease from the time when the grant is fetched, ms
--   live_ms   int   time without a call after which the waiter loses its position, ms
--   boost_ms  int   the waiter's priority: it is queued as if it had arrived this much earlier, ms
--   labels    text  comma-separated labels; the instance must have all of them; '-' for none
--   ticket    text  the waiter's ticket from an earlier reply, or '-' for a new ticket
--   tokens    int   number of tokens that the work is expected to use; counts against the instance's tokens per minute
-- RETURNS
--   {1, id, expiry_ms, fence, record, load, cap}   granted and fetched now, or fetched before with the same token. The
--     values are as in acquire
--   {0, ahead, poll_ms, ticket, back_ms}   queued. ahead: number of waiters before this one. poll_ms: time until a
--     timer may free capacity, at most 1000. back_ms: usually 0. If all instances that are not disabled are unhealthy,
--     resting or rate-limited, back_ms is the time until the first of them comes back, at most a day, or 0 if this time
--     is unknown
--   {-1, why}                           the token is spent. why: the reason in its tombstone, or 'expired'
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  returns the same ticket, or the same lease
-- ERRORS  none
-- COST    O(log W + log N) for W waiters and N instances. It processes at most 16 due timers, and grants units to at
--         most 16 waiters. After the server's clock was set back, each call also corrects some 250 timers, until all
--         are correct
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, TTL_MS, LIVE_MS, BOOST_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local LABELS, TICKET, TOKENS = ARGV[5], ARGV[6], ARGV[7]
--@include strategies
--@include whole_number
--@include records
--@include grants
--@include totals
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local EXPIRIES = 16
local facts = call('HMGET', STATE, '#pool', '#arrived')
local refused = opened(facts[1])
if refused then return refused end
local arrived_us = whole_number(facts[2], 0)
if not arrived_us then return corrupt('#arrived') end
if LABELS ~= '-' then check_types(LABELS) end
local known = call('HGET', STATE, TOKEN)
local function is_ours(record)
  local _, fence = match(record, LEASE)
  if not fence then _, fence = match(record, GRANTED) end
  local ticket, _, need = match(record, WAITING)
  if ticket then return #ticket <= 17 and whole_number(need) end
  return fence and whole_number(fence) or match(record, TOMBSTONE)
end
if known and not is_ours(known) then return corrupt(TOKEN) end
local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
local held = known and (match(known, LEASE) or match(known, GRANTED))
if held and not pool.read(held) then return corrupt(held) end
pool.expire(EXPIRIES)

known = call('HGET', STATE, TOKEN)
if not known or match(known, TOMBSTONE) == 'unfetched' then
  -- The waiter is new, has lost its position, or did not fetch its grant in time. In the last two cases, it queues
  -- again with its old ticket. While the queue is not empty, each new waiter gets a later arrival time than the
  -- previous new waiter. This holds even if the server's clock was set back.
  local ticket = TICKET
  if ticket == '-' then
    if arrived_us < pool.now_us or call('ZCARD', WAITQ) == 0 then arrived_us = pool.now_us - 1 end
    ticket = format('%.0f', arrived_us + 1 - BOOST_MS * 1000)
    call('HSET', STATE, '#arrived', format('%.0f', arrived_us + 1))
  end
  known = write_waiting(ticket, TTL_MS, LABELS, TOKENS)
  call('HSET', STATE, TOKEN, known)
  call('ZREM', DUE, 'X' .. TOKEN)
else
  -- This ZREM removes nothing, but it counts as a write. At maxmemory, the server never refuses a ZREM. After the first
  -- write of a script, the server refuses none of its commands. So even at maxmemory, the poll of a queued waiter
  -- succeeds, and the waiter keeps its ticket.
  call('ZREM', DUE, '')
end
local ticket = match(known, WAITING)
if ticket then
  call('ZADD', DUE, format('%.0f', pool.now_ms + LIVE_MS), 'W' .. TOKEN)
  call('ZADD', WAITQ, 'NX', ticket, TOKEN)  -- NX: a waiter in the queue keeps its ticket
end
pool.dispatch()

known = call('HGET', STATE, TOKEN)
local expiry_ms
local id, fence = match(known, GRANTED)
if id then
  -- The waiter fetches its grant now. Other copies of this request may still arrive. With late=1 in the record, the
  -- release of this lease leaves a tombstone, which refuses such a copy.
  expiry_ms = pool.now_ms + TTL_MS
  call('HSET', STATE, TOKEN, write_lease(id, fence, '1', TTL_MS))
  call('ZADD', DUE, format('%.0f', expiry_ms), TOKEN)
else
  id, fence = match(known, LEASE)
  expiry_ms = id and math.min(tonumber(call('ZSCORE', DUE, TOKEN) or 0), pool.now_ms + TTL_MS)
end
pool.reschedule()
ticket = match(known, WAITING)
if ticket then
  local ahead, poll_ms = call('ZRANK', WAITQ, TOKEN), retry_after_ms(pool.now_ms)
  return {NOTHING, ahead, poll_ms, ticket, pool.back_after_ms() or 0}
end
if not id then return {SPENT, match(known, TOMBSTONE)} end
if expiry_ms <= pool.now_ms then return {SPENT, 'expired'} end
return {DONE, id, expiry_ms, tonumber(fence), call('HGET', STATE, id) or '', sums()}
