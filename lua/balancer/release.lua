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
--   1   this call or an earlier copy of it ended the lease. In one case, the script only assumes that an earlier copy
--     ended the lease: again is 1, bury_ms is 0, and the token has neither a lease nor a tombstone
--   0   the token has no lease: it is unknown or waiting. If bury_ms is not 0, the token's request is now cancelled
--   {-1, why}   the token is spent. why: the reason in its tombstone
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: no unit is freed twice
-- ERRORS  none
-- COST    O(log N + log L) for N instances and L leases. It also grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, ID, OUTCOME = ARGV[1], ARGV[2], ARGV[3]
local RESPONSE_US, BURY_MS, AGAIN, TOKENS, REST_MS = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
--@include strategies
local call, match, format, floor = redis.call, string.match, string.format, math.floor
--@include pool

-- Matches the usual record of an instance. A release copies limit, seq, fence and peak as one text, and also reads
-- limit and seq on their own. It copies the rest of the record, after streak, as another text.
local RELEASE = '^load=(%d+) (limit=(%d+) seq=(%d+) %S+ %S+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) '
  .. 'failed=(%d+) streak=(%d+)( .*)$'
-- Most instances have neither labels nor flags. The fastest test for this is a search for PLAIN in the rest of the
-- record. If PLAIN is not found, or if the score depends on the weight, REST reads the weight and labels. REST matches
-- only if the instance has no flags.
local PLAIN = ' labels=- flags=- cap='
local REST = '^ weight=(%d+%.?%d*) labels=(%S+) flags=%- cap='

local facts = call('HMGET', STATE, TOKEN, '#pool', '#next', ID, '#load')
local response_us, is_ok = tonumber(RESPONSE_US), OUTCOME == 'o'

-- The usual case: the outcome is good or neutral, the instance has no flags, no waiter of this or another shard waits
-- for a unit, and no late copy of the acquire request can arrive. The other cases need the files included below. The
-- usual case returns before the functions of these files are created, which saves 2 us per call. If anything is
-- unusual, such as the form of a field, the code after the includes handles the call. Only that code decides whether a
-- field is corrupt.
local score, _, _, response = rules(facts[2] or '')
local slow_after_us
if not score then
  local pool, slow = match(facts[2] or '', '^(%S+ %S+) slow_after_us=(%d+)$')
  score, _, _, response = rules(pool)
  slow_after_us = tonumber(slow)
end
local is_slow = is_ok and slow_after_us and response_us > slow_after_us
local holder = score and match(facts[1] or '', '^lease instance=(%S+) fence=%d+ ttl_ms=')
if holder == ID and (is_ok or OUTCOME == 'n') and not is_slow and BURY_MS == '0' and facts[3] ~= '0' then
  local load, same, limit, seq, ewma_us, ewma_at_ms, served, failed, streak, rest = match(facts[4] or '', RELEASE)
  local weight, labels, total = '0', '-', tonumber(facts[5] or 1)
  if load and (score == 'free_share' or not string.find(rest, PLAIN, 1, true)) then
    weight, labels = match(rest, REST)
  end
  if load and load ~= '0' and #load <= 10 and #limit <= 10 and #seq <= 15 and #ewma_us <= 15 and #served <= 15
    and weight and (score ~= 'free_share' or weight + 0 <= MAX_WEIGHT)
    and total and total % 1 == 0 and total >= 0 and total <= 1e15 then
    if response_us >= 0 and is_ok then
--@include smoothing
    end
    load, limit = tonumber(load), tonumber(limit)
    local was = load < limit
    -- If the instance was ready before, it stays ready. In this case, its index entry changes only if the score depends
    -- on the load.
    local is_indexed = not was or score == 'load' or score == 'free_share'
    if is_indexed then
      if labels == '-' then call('ZCARD', READY) else check_types(labels) end
    end
    load = load - 1
    if is_ok then served, streak = format('%d', served + 1), '0' end
    call('ZREM', DUE, TOKEN)
    call('HDEL', STATE, TOKEN)
    local record = 'load=' .. load .. ' ' .. same .. ' ewma_us=' .. ewma_us .. ' ewma_at_ms=' .. ewma_at_ms
      .. ' served=' .. served .. ' failed=' .. failed .. ' streak=' .. streak .. rest
    call('HSET', STATE, ID, record, '#load', format('%d', total > 0 and total - 1 or 0))
    if is_indexed then index(score, ID, load, limit, seq, weight, labels, was) end
    return 1  -- DONE, as in records.lua
  end
end
--@include records
--@include field
--@include whole_number
--@include whole_records
--@include labels
--@include health
--@include maintenance

local LATE_MS = 120000
local bury_ms, again = tonumber(BURY_MS), AGAIN == '1'
local refused, _, _, _, _, response, more = opened(facts[2])
if refused then return refused end
local slow_after_us = tonumber(match(more or '', ' slow_after_us=(%d+)'))
local is_slow = is_ok and slow_after_us and response_us > slow_after_us
local holder, fence_held, marked = match(facts[1] or '', LEASE)
if not holder then holder, fence_held = match(facts[1] or '', GRANTED) end
if not holder then
  local why = match(facts[1] or '', TOMBSTONE)
  if why then return (again and why == 'released') and DONE or {SPENT, why} end
  if bury_ms == 0 then return again and DONE or NOTHING end
elseif marked and marked ~= '' then
  bury_ms = math.max(bury_ms, LATE_MS)
end

local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
if not holder then
  pool.tombstone(TOKEN, 'cancelled', bury_ms)
  call('ZREM', WAITQ, TOKEN)
  call('ZREM', DUE, 'W' .. TOKEN)
  pool.reschedule()
  return NOTHING
end
local r = pool.read(holder)
if not r or r.load == 0 then return corrupt(holder) end
call('ZREM', DUE, TOKEN)
call('HDEL', STATE, TOKEN)
if response_us >= 0 and OUTCOME ~= 'n' then
  local ewma_us, ewma_at_ms = r.ewma_us, r.ewma_at_ms
--@include smoothing
  r.ewma_us, r.ewma_at_ms = tonumber(ewma_us), tonumber(ewma_at_ms)
end
pool.end_lease(r, tonumber(fence_held))
if OUTCOME ~= 'n' and OUTCOME ~= 'f' then
  pool.record_outcome(r, is_slow and 's' or OUTCOME, tonumber(fence_held))
end
if OUTCOME == 'l' and REST_MS ~= '0' then pool.rest(r, tonumber(REST_MS), 'rate_limited') end
if TOKENS ~= '0' then pool.settle(r, tonumber(TOKENS)) end
pool.store(r)
if bury_ms > 0 then pool.tombstone(TOKEN, 'released', bury_ms) end
if OUTCOME == 'f' then pool.add_event('released', holder, 'lease', TOKEN) end
pool.dispatch()
pool.reschedule()
return DONE
