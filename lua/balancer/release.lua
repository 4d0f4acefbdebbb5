-- release: give a lease back and note how the work went.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   token       text  @ and the lease's token
--   id          text  the instance, or - when the answer of acquire was never seen
--   outcome     text  o ok, e error, t timeout, j rejected by the instance, n neutral, f freed by hand
--   response_us int   how long the work took, us; -1 when not measured
--   bury_ms     int   how long to refuse a late copy of the acquire, ms; 0 when there can be none
--   again       int   1 when another copy of this release may have been executed, else 0
--   tokens      int   how many more it took than were counted when it was acquired; below 0 for fewer
-- RETURNS
--   1   this call, or the copy before it, freed the unit
--   0   nothing is known of the token
--   {-1, why}   it ended before: e expired  u not fetched  r released  c cancelled
--   {-3, fact}  {-4, field}   other schema; a field we did not write
-- REPEAT  frees nothing twice
-- ERRORS  none
-- COST    O(log N + log L), and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, ID, OUTCOME = ARGV[1], ARGV[2], ARGV[3]
local RESPONSE_US, BURY_MS, AGAIN, TOKENS = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
--@include pool

local LATE_MS = 120000
local id, response_us, bury_ms, again = ID, tonumber(RESPONSE_US), tonumber(BURY_MS), AGAIN == '1'
local facts = call('HMGET', STATE, TOKEN, '#pool', '#next', id, '#load')
if not facts[2] then facts[2] = SCHEMA .. ' none' end
local strategy, slow_us = match(facts[2], POOL)
if not strategy then return {OTHER_SCHEMA, facts[2]} end

local kind, holder, fence_held, marked = match(facts[1] or '', '^([LG]) (%S+) (%d+) (%S+)$')
if not kind then
  local why = match(facts[1] or '', '^X (%a)')
  if why then return (again and why == 'r') and DONE or {SPENT, why} end
  if bury_ms == 0 then return again and DONE or NOTHING end
end
local slow, ewma_us, ewma_ms
if kind then
  if marked == '1' then bury_ms = math.max(bury_ms, LATE_MS) end
  local record = facts[4]
  if holder ~= id then
    id = holder
    record = call('HGET', STATE, id)
  end
  local load, same, lim, seq, weight, labels, flags, served, failed, fails
  load, same, lim, seq, weight, labels, flags, ewma_us, ewma_ms, served, failed, fails = match(record or '', RETURNED)
  if not fails or load == '0' then return {CORRUPT, id} end
  slow = OUTCOME == 'o' and slow_us ~= '' and response_us > tonumber(slow_us)
  if response_us >= 0 and OUTCOME ~= 'n' then
    ewma_us = tonumber(ewma_us)
    if strategy == 'peak_ewma' then
      -- A higher latency counts at once, a lower one with the time that has passed: decay over 10 s.
      local clock = call('TIME')
      local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
      if response_us < ewma_us then
        local keep = math.exp((ewma_ms - now_ms) / 10000)
        response_us = ewma_us * keep + response_us * (1 - keep)
      end
      ewma_us, ewma_ms = response_us, format('%d', now_ms)
    elseif ewma_us == 0 then
      ewma_us = response_us
    else
      ewma_us = ewma_us + 0.2 * (response_us - ewma_us)
    end
    ewma_us = format('%.0f', math.max(1, ewma_us))
  end

  -- The usual case in a straight line: it went well or tells nothing, the instance is in its plain state, nobody waits and no
  -- copy of the acquire can come late. What the others need is included below it, so that it costs them alone.
  if flags == '-' and (OUTCOME == 'o' or OUTCOME == 'n') and not slow and bury_ms == 0 and facts[3] ~= '0' then
    if not whole(facts[5]) then return {CORRUPT, '#load'} end
    check(labels)
    load, lim = tonumber(load), tonumber(lim)
    local was = load < lim
    load = load - 1
    if OUTCOME == 'o' then served, fails = format('%d', served + 1), '0' end
    call('ZREM', DUE, TOKEN)
    call('HDEL', STATE, TOKEN)
    call('HSET', STATE, id, format('%d %s %s %s %s %s %s', load, same, ewma_us, ewma_ms, served, failed, fails),
      '#load', format('%d', math.max(0, (facts[5] or 1) - 1)))
    if not (was and strategy == 'round_robin') then index(strategy, id, load, lim, seq, weight, labels, was) end
    return DONE
  end
end
--@include health
--@include maintenance

local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep()
if not kind then
  all.bury(TOKEN, 'c', bury_ms)
  call('ZREM', WAITQ, TOKEN)
  call('ZREM', DUE, 'W' .. TOKEN)
  all.retime()
  return NOTHING
end
local r = all.read(id)
if not r then return {CORRUPT, id} end
call('ZREM', DUE, TOKEN)
call('HDEL', STATE, TOKEN)
r.ewma_us, r.ewma_ms = tonumber(ewma_us), tonumber(ewma_ms)
all.unload(r, tonumber(fence_held))
if OUTCOME ~= 'n' and OUTCOME ~= 'f' then all.judge(r, slow and 's' or OUTCOME, tonumber(fence_held)) end
if TOKENS ~= '0' then all.true_up(r, tonumber(TOKENS)) end
all.store(r)
if bury_ms > 0 then all.bury(TOKEN, 'r', bury_ms) end
if OUTCOME == 'f' then all.tell('released', id, 'lease', TOKEN) end
all.pump()
all.retime()
return DONE
