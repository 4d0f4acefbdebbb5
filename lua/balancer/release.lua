-- release: end a lease, and record how the work went.
-- KEYS
--   state        HASH  agentperf:{lb:<type>}:state
--   ready        ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due          ZSET  agentperf:{lb:<type>}:due
--   waitq        ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   token        text  '@' followed by the lease's token
--   id           text  the instance, or '-' if the reply of acquire was lost
--   outcome      text  'o': ok; 'e': error; 't': timeout; 'j': rejected by the instance; 'l': rate-limited by the
--                      instance; 'n': neutral; 'f': freed by an operator
--   response_us  int   response time of the work, us; -1 when not measured
--   bury_ms      int   TTL of a tombstone that refuses a late copy of the acquire request, ms; 0 if no copy can arrive
--   again        int   1 when another copy of this release may have been executed before, else 0
--   tokens       int   tokens that the work used, minus the tokens that acquire counted; may be negative
--   rest_ms      int   time for which the instance gets no work after the outcome 'l', ms
-- RETURNS
--   1   this call or an earlier copy of it ended the lease. If again is 1, bury_ms is 0 and the token has neither a
--     lease nor a tombstone, the script assumes that an earlier copy ended the lease
--   0   the token has no lease: it is unknown or waiting. If bury_ms is not 0, the token's request is now cancelled
--   {-1, why}   the request had ended before. why: the reason in its tombstone
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: no unit is freed twice
-- ERRORS  none
-- COST    O(log N + log L) for N instances and L leases. It also grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, ID, OUTCOME = ARGV[1], ARGV[2], ARGV[3]
local RESPONSE_US, BURY_MS, AGAIN, TOKENS, REST_MS = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
--@include strategies
--@include records
--@include releases
--@include pool

local LATE_MS = 120000
local id, response_us, bury_ms, again = ID, tonumber(RESPONSE_US), tonumber(BURY_MS), AGAIN == '1'
local facts = call('HMGET', STATE, TOKEN, '#pool', '#next', id, '#load')
local refused, _, score, _, _, response, more = opened(facts[2])
if refused then return refused end
if not score then score, _, _, response = rules(DEFAULT_STRATEGY) end

local holder, fence_held, marked = match(facts[1] or '', LEASE)
if not holder then holder, fence_held = match(facts[1] or '', GRANTED) end
if not holder then
  local why = match(facts[1] or '', TOMBSTONE)
  if why then return (again and why == 'released') and DONE or {SPENT, why} end
  if bury_ms == 0 then return again and DONE or NOTHING end
end
local slow, ewma_us, ewma_at_ms
if holder then
  if marked and marked ~= '' then bury_ms = math.max(bury_ms, LATE_MS) end
  local record = facts[4]
  if holder ~= id then
    id = holder
    record = call('HGET', STATE, id)
  end
  local load, same, limit, seq, served, failed, streak, rest
  load, same, limit, seq, ewma_us, ewma_at_ms, served, failed, streak, rest = match(record or '', RELEASE)
  if load == '0' then return corrupt(id) end
  if not load then  -- either the fields are in another order, or the library did not write the record
    ewma_us, ewma_at_ms = field(record or '', 'ewma_us'), field(record or '', 'ewma_at_ms')
    if not tonumber(ewma_us or '') or not tonumber(ewma_at_ms or '') then return corrupt(id) end
  elseif #load > 10 or #limit > 10 or #seq > 15 or #ewma_us > 15 or #served > 15 then
    return corrupt(id)
  end
  local slow_after_us = more and more ~= '' and match(more, SLOW_AFTER)
  slow = OUTCOME == 'o' and slow_after_us and response_us > tonumber(slow_after_us)
  if response_us >= 0 and OUTCOME ~= 'n' then
    ewma_us = tonumber(ewma_us)
    if response == 'peak' then
      -- A higher latency replaces the smoothed latency at once. A lower latency replaces it gradually, with a time
      -- constant of 10 s.
      local clock = call('TIME')
      local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
      if response_us < ewma_us then
        local keep = math.exp(math.min(0, ewma_at_ms - now_ms) / 10000)
        response_us = ewma_us * keep + response_us * (1 - keep)
      end
      ewma_us, ewma_at_ms = response_us, format('%d', now_ms)
    elseif ewma_us == 0 then
      ewma_us = response_us
    else
      ewma_us = ewma_us + 0.2 * (response_us - ewma_us)
    end
    ewma_us = format('%d', (ewma_us > 1 and ewma_us or 1) + 0.5)
  end

  -- The usual case: the outcome is good or neutral, the instance has no flags, no waiter of this or another shard waits
  -- for a unit, and no late copy of the acquire request can arrive. The other cases need the files included below. The
  -- usual case returns before the functions of these files are created, which saves 1.3 us per call.
  local labels, flags, weight = '-', '-', '0'
  if not load then
    flags = nil
  elseif score == 'free_share' then
    weight = match(rest, PLAIN_WEIGHT)
    if not weight then
      labels, flags, weight = field(rest, 'labels'), field(rest, 'flags'), match(rest, ' weight=(%d+%.?%d*) ')
    end
    if weight and tonumber(weight) > MAX_WEIGHT then return corrupt(id) end
  elseif not string.find(rest, PLAIN, 1, true) then
    labels, flags = field(rest, 'labels'), field(rest, 'flags')
  end
  local is_plain = load and labels and weight and flags == '-'
  if is_plain and (OUTCOME == 'o' or OUTCOME == 'n') and not slow and bury_ms == 0 and facts[3] ~= '0' then
    local total = tonumber(facts[5] or 1)
    if not total or total % 1 ~= 0 or total < 0 or total > 1e15 then return corrupt('#load') end
    load, limit = tonumber(load), tonumber(limit)
    local was = load < limit
    -- If the instance was ready before, it stays ready. Then its index entry changes only if the score depends on the
    -- load.
    local is_indexed = not was or score == 'load' or score == 'free_share'
    if is_indexed then
      if labels == '-' then call('ZCARD', READY) else check_types(labels) end
    end
    load = load - 1
    if OUTCOME == 'o' then served, streak = format('%d', served + 1), '0' end
    call('ZREM', DUE, TOKEN)
    call('HDEL', STATE, TOKEN)
    call('HSET', STATE, id, write_release(load, same, ewma_us, ewma_at_ms, served, failed, streak, rest),
      '#load', format('%d', total > 0 and total - 1 or 0))
    if is_indexed then index(score, id, load, limit, seq, weight, labels, was) end
    return DONE
  end
end
--@include whole_number
--@include whole_records
--@include labels
--@include health
--@include maintenance

local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
if not holder then
  pool.tombstone(TOKEN, 'cancelled', bury_ms)
  call('ZREM', WAITQ, TOKEN)
  call('ZREM', DUE, 'W' .. TOKEN)
  pool.reschedule()
  return NOTHING
end
local r = pool.read(id)
if not r or r.load == 0 then return corrupt(id) end
call('ZREM', DUE, TOKEN)
call('HDEL', STATE, TOKEN)
r.ewma_us, r.ewma_at_ms = tonumber(ewma_us), tonumber(ewma_at_ms)
pool.end_lease(r, tonumber(fence_held))
if OUTCOME ~= 'n' and OUTCOME ~= 'f' then pool.record_outcome(r, slow and 's' or OUTCOME, tonumber(fence_held)) end
if OUTCOME == 'l' and REST_MS ~= '0' then pool.rest(r, tonumber(REST_MS), 'rate_limited') end
if TOKENS ~= '0' then pool.settle(r, tonumber(TOKENS)) end
pool.store(r)
if bury_ms > 0 then pool.tombstone(TOKEN, 'released', bury_ms) end
if OUTCOME == 'f' then pool.add_event('released', id, 'lease', TOKEN) end
pool.dispatch()
pool.reschedule()
return DONE
