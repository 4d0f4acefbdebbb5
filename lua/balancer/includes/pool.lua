-- The pool: the contents of its keys, and the functions with which scripts use them. Needs `call` and `format`. Only
-- this file, health.lua and maintenance.lua add members to the keys `ready`, `ready@<label>` and `away`, and entries to
-- the stream `events`. A script that includes one of these three files must assign its keys to the variables STATE,
-- READY, DUE and WAITQ. The functions in these files use the variables directly, because parameters for the keys would
-- cost time on every acquire and release.
--
-- All keys of an undivided pool begin with the same <tag>, agentperf:{lb:<type>}, so that they are in one hash slot. If
-- a pool is divided into shards, each shard has all of these keys under its own <tag>. The <tag> of shard 3 of 8 is,
-- for example, agentperf:{lb:<type>#3/8.30} (30: see keys.py). A call of a script uses the keys of only one shard. Only
-- layout.lua divides a pool. The header of layout.lua also describes #pool of a divided pool. Once a pool has no
-- instances, no leases and no waiters, its keys expire after a minute, or after a day if `configure` has set its
-- settings.
--   <tag>:state  HASH  the records. A record is a list of words, most of them "name=value"; "-" is an empty value.
--     <id>       an instance, with these fields in this order:
--       load           leases on the instance now
--       limit          max leases now; 0 while the instance takes no work. An instance is ready while load < limit
--       seq            the value of #picks after the last pick of this instance
--       fence          its last fencing token: the grant time, us, or the previous token + 1, whichever is higher
--       peak           highest load that the instance has had
--       ewma_us        smoothed response time, us; 0 when none was measured
--       ewma_at_ms     time of the last measurement, ms; kept up to date only under PEAK_EWMA
--       served         leases released with the outcome ok
--       failed         leases released with the outcome error, timeout, rejected or rate-limited
--       streak         bad outcomes since the last good one; see `record_outcome` in health.lua
--       weight         share under WEIGHTED, decimal
--       labels         names, comma-separated
--       flags          names, comma-separated and sorted. There are three groups of flags. The flag unhealthy belongs
--                      to the group disabled, not to the group unhealthy
--         disabled:      heartbeat_missed, unhealthy (set by hand), draining, removed (until its last lease ends)
--         unhealthy:     ejected (for its outcomes), down (fails its active checks), half_open (after an ejection)
--         limited:       adaptive (concurrency limit below cap), warming, metered (has rate limits), rate_limited
--                        (one of its rate limits is used up), resting (it refused work, or a caller lets it rest)
--       cap            max concurrent leases, as registered
--     +<id>      an extra record, which only some instances have. A field that is 0 is left out; a record without
--                fields is "-".
--       ejections            number of ejections in a row
--       ejected_until_ms     end of the last ejection
--       probe_since_us       while the instance is ejected: start of the ejection; after that: end of the ejection.
--                            Leases granted after this time are probes
--       leases_before        while the instance is half-open: number of present leases granted before probe_since_us
--       adaptive_limit_milli adaptive concurrency limit times 1000, decimal
--       limit_cut_us         when the adaptive limit was last lowered
--       warm_tenths          during a warm-up: the usable tenths of the capacity
--       checks               number of active checks passed in a row; negative: failed in a row
--       checked_ms           when a worker claimed the last check that `checks` counts
--       rpm, tpm             rate limits: requests and tokens per minute, decimal
--       rpm_arrival_us, tpm_arrival_us   theoretical arrival times (GCRA) of the two rate limits
--       metered_us           when the arrival times were last changed
--       heartbeat_ms         time without a heartbeat after which the instance is disabled, as registered
--       rest_until_ms        while the instance rests: the end of the rest
--       rest_set_ms          when rest_until_ms was set
--     @<token>   the state of a request for a lease; one of
--       lease instance= fence= [late=1] ttl_ms=   late=1: another copy of the request may still arrive
--       grant instance= fence= ticket=            granted to a waiter that has not fetched the grant yet
--       waiting ticket= ttl_ms= labels= tokens=   ticket: the score of the waiter in waitq
--       tombstone why=                            why: released, expired, unfetched, cancelled or refused
--     #pool      schema= strategy=, and slow_after_us= if slow outcomes count as bad; see layout.lua for a divided pool
--     #settings  eject_after base_ejection_ms max_ejection_ms max_ejection_share panic_threshold slow_after_us adaptive
--                slow_start_ms rate_burst_ms unhealthy_threshold healthy_threshold, as name=value; see PoolSettings
--     #born      when the pool was created, us
--     #picks     number of leases granted so far
--     #load      sum of the loads
--     #cap       sum of the capacities of the instances that take work
--     #usable    number of instances that are not disabled
--     #unhealthy   number of usable instances that are unhealthy
--     #warming   number of usable instances that are healthy and warming up
--     #panic     start of the panic, ms; only during a panic
--     #calm      end of the last panic, ms
--     #arrived   when the last waiter arrived, us
--     #claimed   when checks were last claimed, ms
--     #next      time of the next maintenance, ms, no later than the first time in due; 0 while the queue has waiters
--                or #watched is set
--     #watched   time, ms, until which waiters of other shards watch this shard; see watch.lua
--     #expires   while the pool has no instance: the TTL that its keys were given, ms
--     #configured   1 if `configure` has set the settings
--     #clock     a recent time of the server, ms: at most 30 s before the last maintenance of the pool. While timers
--                are corrected because the server's clock was set back, #clock also holds the cursor of the ZSCAN
--                over <tag>:due
--   <tag>:ready          ZSET    <id> -> score by strategy; instances that may be leased
--   <tag>:ready@<label>  ZSET    the members of ready that have this label; the scripts compute the name of this key
--   <tag>:due            ZSET    <timer> -> when it is due, ms. The timers are:
--                                @<token>     a lease or grant expires
--                                W@<token>    remove a waiter that stopped polling
--                                X@<token>    delete a tombstone
--                                H:<id>       a heartbeat is due
--                                E:<id>       an ejection ends
--                                R:<id>       a rate limit recovers
--                                V:<id>       the next step of a warm-up
--                                C:<id>       a rest ends
--                                P:<cursor>   panic began or ended; update the next batch of the members of away
--   <tag>:waitq          ZSET    @<token> -> ticket: arrival time, us, minus the priority. Grants are published on a
--                                channel with the name of this key
--   <tag>:away           ZSET    <id> -> when the instance comes back, ms; 0 if this time is not known. The members are
--                                the usable instances that are unhealthy, resting or rate-limited
--   <tag>:events         STREAM  kind, id and details; about the last EVENTS_KEPT entries, see health.lua
--   <tag>:ids            ZSET    <id> -> when the instance was registered, us
--   <tag>:ring           ZSET    <id>#<n> -> position of a point of the instance on the ring; only under
--                                CONSISTENT_HASH
--   <tag>:checks         ZSET    <id> -> when the next active check of the instance is due, ms; see claim_checks.lua
--   <tag>:history        HASH    see history.lua
--
-- If a later minor version has added fields to the record of an instance, the scripts keep these fields. The patterns
-- and functions for records are in records.lua, whole_records.lua, grants.lua, acquire.lua and release.lua. The
-- functions for extra records are in maintenance.lua. pick.lua also reads records.

-- Raise an error if one of these keys has the wrong type: ready, and ready@<label> for each of `labels`. Scripts call
-- this before their first write.
local function check_types(labels)
  call('ZCARD', READY)
  if labels ~= '-' then
    for label in string.gmatch(labels, '[^,]+') do call('ZCARD', READY .. '@' .. label) end
  end
end

-- Pack two numbers into one score: load / limit in steps of 1/8192, and the number of the last pick. The score orders
-- instances by load / limit, and instances with the same load / limit by their last pick. The order by load / limit is
-- exact for limits up to 90: with such limits, two different values of load / limit differ by more than 1/8192. The
-- order by the last pick is exact for the first 2^40 picks of the pool. The score stays below 2^53. No script unpacks
-- the score, but tests do; see tests/support/records.py.
local function pack_load(load, limit, seq)
  local share = load * 8192 / limit
  return (share - share % 1) * 1099511627776 + seq
end

-- If the load of an instance is below its limit, add the instance to ready, and to ready@<label> for each of its
-- labels. Otherwise, remove the instance from these keys.
--   score  the kind of score of the pool's strategy, see strategies.lua
--   was    whether the instance was ready before, nil when unknown
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
