-- acquire: pick an instance and lease one unit of its capacity, at most once per token.
-- KEYS
--   state   HASH  agentperf:{lb:<type>}:state
--   ready   ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due     ZSET  agentperf:{lb:<type>}:due
--   waitq   ZSET  agentperf:{lb:<type>}:waitq
--   ids     ZSET  agentperf:{lb:<type>}:ids
--   ring    ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   token   text  '@' followed by the client's token
--   ttl_ms  int   TTL of the lease, ms
--   late    int   1 when another copy of this request may still arrive, else 0
--   wanted  text  strategy the pool must have, or '-' for any
--   labels  text  comma-separated labels; the instance must have all of them; '-' for none
--   point   int   position on the ring, 0 to 2^48 - 1: a hash of the caller's affinity; without affinity, random
--   random  int   random number, 0 to 2^52 - 1
--   tokens  int   expected number of LLM tokens that the work uses; counts against the instance's tokens per minute
-- RETURNS
--   {1, id, expiry_ms, fence, record, load, cap}   the lease granted to this token, now or before. id: the instance.
--     record: the text of its record. load: sum of the loads of all instances after the grant. cap: sum of the
--     capacities of the instances that take work
--   {0, retry_ms, registered, waiting, disabled, unhealthy, rate_limited}
--     no lease is granted. retry_ms: time until a timer may free capacity, ms, at most 1000. registered: number of
--     instances. waiting: number of waiters. disabled: number of instances that are draining, have missed their
--     heartbeat or were marked unhealthy by hand. unhealthy: number of instances that are ejected, half-open or failing
--     their checks. rate_limited: number of instances that are resting or have used up a rate limit. Each instance
--     counts at most once: as disabled, else as unhealthy, else as rate_limited. If all instances that are not disabled
--     count as unhealthy or rate_limited, retry_ms is the time until the first of them comes back, ms, at most a day.
--     If this time is unknown, retry_ms has its usual value
--   {-1, why}                            the token is spent. why: the reason in the token's tombstone; 'expired' if the
--     lease has expired and has no tombstone yet; 'waiting' or 'grant' if the token was used in a call of wait
--   {-2, strategy}                       the pool has another strategy
--   {-3, fact}  {-4, field}  {-7, strategy}   as in records.lua
-- REPEAT  a second copy of the request returns the same lease. The copy is refused if the token was cancelled, if the
--         lease expired, or if the release of the lease left a tombstone. The release leaves a tombstone if late was 1
--         in a copy of this request, or if bury_ms of the release is not 0
-- ERRORS  none
-- COST    O(log N + log L) for N instances and L leases. In the usual case, it calls 6 commands under least_loaded,
--         round_robin and random, and 7 to 13 under the other strategies. It calls 1 or 2 more if wanted is '-' and the
--         pool's strategy picks in another way than least_loaded. When timers are due, it processes at most 8 rounds of
--         8 timers. After the server's clock was set back, each round also corrects some 250 timers, until all are
--         correct
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local TOKEN, TTL_MS, LATE, WANTED = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local LABELS, POINT, RANDOM, TOKENS = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
--@include strategies
local call, match, format, floor = redis.call, string.match, string.format, math.floor
--@include grants
--@include pool
--@include pick

local EXPIRIES, ROUNDS = 8, 8
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = floor(now_us / 1000)
local expiry_ms = now_ms + TTL_MS
local several = string.find(LABELS, ',', 1, true)
local from = (LABELS == '-' or several) and READY or READY .. '@' .. LABELS

-- Pick an instance now, so that one HMGET can read its record together with the facts about the pool. The pool's
-- strategy is not known yet, so this pick assumes the wanted strategy or the default. If the pool has another strategy,
-- the pick is repeated below. A pick from the ring needs the facts about the pool, so it comes after the HMGET. If
-- there is no record to read, the HMGET reads the token a second time instead.
local _, expected = rules(POOL .. (WANTED == '-' and DEFAULT_STRATEGY or WANTED))
local id, record
if not several and expected and expected ~= 'ring' then id, record = pick(expected, from, RANDOM, POINT, now_ms) end
local facts = call('HMGET', STATE, TOKEN, '#pool', '#next', '#picks', '#load', '#cap', not record and id or TOKEN)
local next_ms, picks = tonumber(facts[3] or 0), tonumber(facts[4] or 0)
local sum, cap = tonumber(facts[5] or 0), tonumber(facts[6] or 0)

-- Normally, next_ms, picks, sum and cap are whole numbers. If another program has changed one of them, `maintenance`
-- reports the change. If one of them is infinite or NaN, the total is infinite or NaN, so the check of the total finds
-- this too.
local total = next_ms and picks and sum and cap and picks >= 0 and next_ms + picks + sum + cap or -1
local look = next_ms == nil or next_ms <= now_ms or total < 0 or total > 9e15 or total % 1 ~= 0

-- The usual case: the token is new, nothing is due, the queue is empty, and the instance has no rate limits. The other
-- cases need the files included below. The usual case returns before the functions of these files are created, which
-- saves 2 us per call. If anything is unusual, such as the form of a field, the code below the includes handles the
-- call. That code reads the record of `id` again. Only that code decides whether a field is corrupt.
local score, how, _, _, strategy = rules(facts[2] or '')
if not score then score, how, _, _, strategy = rules(match(facts[2] or '', '^(%S+ %S+) slow_after_us=%d+$')) end
if look or several or facts[1] or not score or WANTED ~= '-' and WANTED ~= strategy then
  id, look = nil, look or not several
else
  if how == expected and how ~= 'ring' then
    record = id and (record or facts[7])
  else
    id, record = pick(how, from, RANDOM, POINT, now_ms, sum, cap)
    record = id and (record or call('HGET', STATE, id))
  end
  local load, limit, fence, peak, rest, weight, labels, flags = match(record or '', GRANT)
  if load and #load <= 10 and #limit <= 10 and (score ~= 'free_share' or weight + 0 <= MAX_WEIGHT) then
    local limit_text = limit
    load, limit, fence = tonumber(load), tonumber(limit), fence + 1
    if load >= limit then
      id = nil
    elseif fence <= 9e15 and (flags == '-' or not string.find(flags, 'metered', 1, true)) then
      if labels ~= '-' then check_types(labels) end
      load = load + 1
      if fence < now_us then fence = now_us end
      if load > tonumber(peak) then peak = load end
      local seq = format('%d', picks + 1)
      local fence_text = format('%d', fence)
      record = 'load=' .. load .. ' limit=' .. limit_text .. ' seq=' .. seq .. ' fence=' .. fence_text .. ' peak='
        .. peak .. rest
      call('ZADD', DUE, format('%d', expiry_ms), TOKEN)
      call('HSET', STATE, id, record, TOKEN, write_lease(id, fence_text, LATE, TTL_MS),
        '#picks', seq, '#load', format('%d', sum + 1))
      if expiry_ms < next_ms then call('HSET', STATE, '#next', format('%d', expiry_ms)) end
      index(score, id, load, limit, seq, weight, labels, true)
      return {1, id, expiry_ms, fence, record, sum + 1, cap}  -- 1: DONE, as in records.lua
    end
  end
end
--@include records
--@include totals
--@include repeats
--@include whole_number
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

if facts[1] then return repeated(TOKEN, facts[1], LATE, TTL_MS, now_ms) end
local refused, stored
refused, stored, _, how = opened(facts[2])
if refused then return refused end
if WANTED ~= '-' and WANTED ~= stored then
  if not rules(POOL .. WANTED) then return {UNKNOWN_STRATEGY, WANTED} end
  if call('ZCARD', IDS) > 0 then return {OTHER_STRATEGY, stored} end
end
if not stored then return {NOTHING, 1000, 0, 0, 0, 0, 0} end

-- Each round of the loop below processes at most EXPIRIES due timers. It then grants free units to waiters, so that
-- this caller does not overtake a waiter. While no unit is free and more timers may be due, another round follows, up
-- to ROUNDS rounds in all. If the pool seems full, the next lines check whether the server's clock was set back. If the
-- clock was set back, rounds are needed even if no timer is due, because `maintain` also corrects the timers.
local is_old
if not look and not id then
  local is_set_back
  is_set_back, is_old = read_clock(call('HGET', STATE, '#clock'), now_ms)
  look = is_set_back ~= false or has_distant_timer(now_ms)
end
local pool = (look or several or id) and maintenance(now_us)
local suits = several and function(candidate) return has_all(field(candidate, 'labels') or '', LABELS) end
if pool and pool.invalid then return corrupt(pool.invalid) end
if look then  -- check the types of the keys that are read after the first write
  call('ZCARD', IDS)
  call('ZCARD', RING)
  if LABELS ~= '-' then check_types(LABELS) end
end
for _ = 1, (look or several) and ROUNDS or 0 do
  local expired, dispatched = 0, true
  if look then
    expired, dispatched = pool.maintain(EXPIRIES)
    facts = call('HMGET', STATE, TOKEN, '#pool', '#next', '#picks', '#load', '#cap')
  end
  if dispatched and (not several or how == 'ring') then
    id = pick(how, from, RANDOM, POINT, now_ms, facts[5], facts[6], suits)
  end
  if dispatched and several and not id then id = pool.best(LABELS) end
  if id or expired < EXPIRIES then break end
end
if id then
  local r = pool.read(id)
  -- A corrupt record is reported only if this call has written nothing. Otherwise a later call reports it.
  if not r and not pool.changed then return corrupt(id) end
  if r and r.load < r.limit then
    local fence, text = pool.grant(r, TOKEN, expiry_ms, write_lease, LATE, tonumber(TOKENS))
    pool.reschedule()
    return {DONE, id, expiry_ms, fence, text, sums()}
  end
end

--@include refusals
local refusal = refusal_reply(pool, IDS, now_us)
if is_old and not look then
  call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
  call('HSET', STATE, '#clock', format('%d', now_ms))
end
return refusal
