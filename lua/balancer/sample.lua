-- sample: add the figures of a pool to its history. In each slice of ten seconds, only the first call adds them. Like
-- `status`, this call first processes due timers. So the history and `status` show the same figures, except for leases
-- on removed instances (see the end of the script).
-- KEYS
--   state    HASH  agentperf:{lb:<type>}:state
--   ready    ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due      ZSET  agentperf:{lb:<type>}:due
--   waitq    ZSET  agentperf:{lb:<type>}:waitq
--   ids      ZSET  agentperf:{lb:<type>}:ids
--   history  HASH  agentperf:{lb:<type>}:history
-- ARGV
--   none
-- RETURNS
--   {1, wait_ms}  sampled now. The next slice begins in wait_ms
--   {0, wait_ms}  already sampled in this slice. The next slice begins in wait_ms
--   {0, 0}        there is no such pool, or it has no instance
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: the slice is already sampled
-- ERRORS  CORRUPT <key>: the key of the history has a wrong type, or holds a value that this library did not write;
--         nothing was written
-- COST    O(log N) for N instances; O(N) while at least one instance is disabled, unhealthy, resting or rate-limited.
--         It processes at most 64 due timers, grants units to at most 16 waiters, and then reads up to 5000 due timers
local STATE, READY, DUE, WAITQ, IDS, HISTORY = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance
--@include overdue
--@include history

local AWAY = string.sub(READY, 1, -6) .. 'away'
-- An instance with one of these flags is not healthy. balancer/commands/records.py has the same flags.
local NOT_HEALTHY = {unhealthy = true, heartbeat_missed = true, ejected = true, down = true}

-- Return the number of healthy instances, the sum of all capacities, and the first instance whose record the library
-- did not write.
local function read_instances()
  local facts, registered = call('HMGET', STATE, '#usable', '#cap'), call('ZCARD', IDS)
  -- #cap is the sum of the capacities of the instances that take work. All scripts except `repair` change this sum with
  -- HINCRBY. So if another program has deleted #cap, the sum may be negative. Here, a negative value counts as 0.
  local usable, capacity = whole_number(facts[1]), whole_number(facts[2]) or 0
  if usable == registered and call('ZCARD', AWAY) == 0 then return registered, capacity end  -- all instances take work
  local healthy, invalid = registered, nil
  for from = 0, registered - 1, 1000 do
    local ids = call('ZRANGE', IDS, from, from + 999)
    for i, record in ipairs(call('HMGET', STATE, unpack(ids))) do
      -- Only records with flags are parsed. Most records have no flags, and parsing takes much longer than this search.
      if not record or not string.find(record, ' flags=- ', 1, true) then
        local flags, limit, cap = nil, nil, nil
        if record then
          flags = field(record, 'flags')
          limit, cap = whole_number(field(record, 'limit')), whole_number(field(record, 'cap'))
        end
        if not flags or not limit or not cap then
          invalid = invalid or ids[i]
        else
          local is_healthy = true
          for flag in string.gmatch(flags, '[^,]+') do is_healthy = is_healthy and not NOT_HEALTHY[flag] end
          if not is_healthy then healthy = healthy - 1 end
          if limit == 0 then capacity = capacity + cap end
        end
      end
    end
  end
  return healthy, capacity, invalid
end

local facts = call('HMGET', STATE, '#pool', '#load', '#expires')
if not facts[1] or facts[3] then return {NOTHING, 0} end
local refused = opened(facts[1])
if refused then return refused end
if not whole_number(facts[2], 0) then return corrupt('#load') end
local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
local history, wait_ms, refusal = open_history(HISTORY, pool.now_ms)
if refusal then return refusal end
if not history then return {NOTHING, wait_ms} end
local healthy, capacity, invalid = read_instances()
if invalid then return corrupt(invalid) end

pool.maintain(EXPIRIES)
if pool.changed then healthy, capacity = read_instances() end
local unhealthy = call('ZCARD', IDS) - healthy
-- #load includes the leases on removed instances until these leases end. The history cannot leave them out, because no
-- index contains a removed instance. `status` does not count these leases.
local load, waiters = whole_number(call('HGET', STATE, '#load')) or 0, call('ZCARD', WAITQ)
save_history(history, {
  {'load', 'sum', load}, {'waiters', 'max', waiters}, {'unhealthy', 'max', unhealthy},
  {'last_load', 'last', load}, {'last_waiters', 'last', waiters}, {'last_healthy', 'last', healthy},
  {'last_unhealthy', 'last', unhealthy}, {'last_overdue', 'last', count_overdue(pool.now_ms)},
  {'last_capacity', 'last', capacity},
})
return {DONE, history.next_ms}
