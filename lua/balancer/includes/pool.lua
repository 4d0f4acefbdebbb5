-- The pool: the contents of its keys, and the functions that every script needs for them. Expects strategies.lua and
-- records.lua. Only this file, health.lua and maintenance.lua write the pool's indexes (ready, ready@<label>, due,
-- waitq, away) and its events. A script that includes them names its KEYS STATE, READY, DUE and WAITQ. The functions
-- read these names and take no argument for them: they are the same in every call, and each argument would be passed on
-- every acquire and release.
--
-- All keys of a pool begin with the same <tag>, agentperf:{lb:<type>}, so that they lie in one hash slot.
--   <tag>:state  HASH  the records. A record is words, most of them "name=value"; "-" stands for an empty value.
--     <id>       an instance. These fields, in this order:
--       load           leases on it now
--       limit          leases that it may bear now; 0 while it takes no work, so that it is ready while load < limit
--       seq            number of its last pick, of those counted in #picks
--       fence          its last fencing token: microseconds, or one more than the one before
--       peak           highest load so far
--       ewma_us        smoothed response time, us; 0 when none was measured
--       ewma_at_ms     when it was measured last, ms; written under PEAK_EWMA
--       served         leases released with the outcome ok
--       failed         leases released with a bad outcome
--       streak     bad outcomes since the last good one
--       weight         share under WEIGHTED, decimal
--       labels         names, comma-separated
--       flags          names, comma-separated and sorted:
--         disabled:      heartbeat_missed, unhealthy (marked by hand), draining, removed (kept for its last leases)
--         unhealthy:     ejected (for its outcomes), down (fails its active checks), half_open (after an ejection)
--         limited:       adaptive (concurrency limit below cap), warming, metered (has rates), rate_limited (no rate
--                        is left)
--       cap            leases that it bears at once, as registered
--     +<id>      the extra record of few instances. A field that is 0 is left out; a record without fields is "-".
--       ejections            in a row
--       ejected_until_ms     end of the last ejection
--       probe_since_us       leases granted from then on are probes; the time of the last ejection or of its end
--       leases_before        leases from before that, while it is half-open
--       adaptive_limit_milli adaptive concurrency limit, in 1/1000, decimal
--       limit_cut_us         when that limit was lowered last
--       warm_tenths          tenths of its capacity that it has while it warms up
--       checks               active checks passed in a row; failed ones below 0
--       checked_ms           when the last one of them was claimed
--       rpm, tpm             requests and tokens a minute, decimal
--       rpm_arrival_us, tpm_arrival_us   their theoretical arrival times
--       heartbeat_ms         after this time without a heartbeat it is disabled, as registered
--     @<token>   the state of a request for a lease; one of
--       lease instance= fence= [late=1]         late: a copy of its request may still be under way
--       grant instance= fence= ticket=          granted to a waiter that has not fetched it yet
--       waiting ticket= ttl_ms= labels= tokens=   ticket: its score in waitq
--       tombstone why=                          why: released, expired, unfetched, cancelled
--     #pool      schema= strategy=, and slow_after_us= when slow outcomes count as bad
--     #settings  eject_after base_ejection_ms max_ejection_ms max_ejection_share panic_threshold slow_after_us adaptive
--                slow_start_ms rate_burst_ms unhealthy_threshold healthy_threshold, name=value each; the PoolSettings
--     #born      when the pool was founded, us        #picks      leases granted so far
--     #load      sum of the loads                     #cap        sum of the capacities of instances that take work
--     #usable    instances that are not disabled      #unhealthy  those of them that are unhealthy
--     #warming   those of them that warm up           #panic      start of the panic, ms; only while there is one
--     #calm      end of the last panic, ms            #next       the pool needs maintenance from then on, ms: a lower
--                                                                 bound of due; 0 while the queue is not empty
--   <tag>:ready          ZSET    <id> -> score by strategy; instances that may be leased
--   <tag>:ready@<label>  ZSET    the same for instances with a label; the name is computed
--   <tag>:due            ZSET    timers -> time, ms. @<token>: a lease or grant ends
--                                W@<token>: a waiter is gone | X@<token>: a tombstone is deleted
--                                H:<id>: a heartbeat is due | E:<id>: an ejection ends | R:<id>: a rate comes back
--                                V:<id>: the next step of a warm-up
--                                P:<cursor>: more unhealthy instances follow the start or end of a panic
--   <tag>:waitq          ZSET    @<token> -> ticket: arrival, us, less its priority; also the channel of grants
--   <tag>:away           ZSET    <id> -> when it comes back, ms, 0 for unknown: usable, but unhealthy or rate-limited
--   <tag>:events         STREAM  kind, id and details; about the last EVENTS_KEPT
--
-- Fields that a later minor version adds to the record of an instance are kept. records.lua,
-- whole_records.lua and grants.lua read and write all records.

-- Reject a key of the wrong type before the first write. Without labels, only ready is looked at.
local function check_types(labels)
  call('ZCARD', READY)
  if labels ~= '-' then
    for label in string.gmatch(labels, '[^,]+') do call('ZCARD', READY .. '@' .. label) end
  end
end

-- The first counter that is no whole number, nil when all are: arithmetic on it would fail after the first write. The
-- caller passes the counters if it has read them; otherwise they are read here.
local function invalid_counter(next_ms, picks, load, cap)
  if not next_ms then next_ms, picks, load, cap = unpack(call('HMGET', STATE, '#next', '#picks', '#load', '#cap')) end
  return not whole(next_ms) and '#next' or not whole(picks) and '#picks' or not whole(load) and '#load'
    or not whole(cap) and '#cap' or nil
end

-- Relative load in 1/8192, then the last pick, in one score: exact for capacities up to 90 and 2^40 picks, and below
-- 2^53 in all. No script unpacks it; tests do, see tests/support/records.py.
local function pack_load(load, limit, seq)
  local share = load * 8192 / limit
  return (share - share % 1) * 1099511627776 + seq
end

-- Add an instance to the indexes of ready instances, or remove it from them, as its record says.
--   score: of its strategy, as in strategies.lua. was: whether it was ready before, nil when that is not known.
local function index(score, id, load, limit, seq, weight, labels, was)
  local value = '0'
  if load < limit then
    if score == 'load' then
      value = format('%d', pack_load(load, limit, seq))
    elseif score == 'last_pick' then
      value = seq
    elseif score == 'free_share' then
      value = format('%d', weight * 1e9 * (limit - load) / limit)
    elseif was then
      return
    end
    call('ZADD', READY, value, id)
  elseif was == false then
    return
  else
    value = nil
    call('ZREM', READY, id)
  end
  if labels ~= '-' then
    for label in string.gmatch(labels, '[^,]+') do
      if value then call('ZADD', READY .. '@' .. label, value, id) else call('ZREM', READY .. '@' .. label, id) end
    end
  end
end

-- Whether labels, as a record has them, include all of others.
local function has_all(labels, others)
  for label in string.gmatch(others, '[^,]+') do
    if not string.find(',' .. labels .. ',', ',' .. label .. ',', 1, true) then return false end
  end
  return true
end
