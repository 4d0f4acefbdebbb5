-- repair: recompute the load of one page of instances from their leases, and rewrite their records, indexes and timers.
-- A lost heartbeat timer cannot be recomputed, but the next heartbeat sets it again. If the library did not write the
-- record of an instance, the instance is left unchanged.
-- KEYS
--   state  HASH  agentperf:{lb:<type>}:state
--   ready  ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due    ZSET  agentperf:{lb:<type>}:due
--   waitq  ZSET  agentperf:{lb:<type>}:waitq
--   ids    ZSET  agentperf:{lb:<type>}:ids
-- ARGV
--   first  int   rank of the first instance of the page
--   count  int   instances per page
-- RETURNS
--   {1, next_rank, wrong, orphans, registered}   next_rank: rank of the first instance of the next page, 0 after the
--     last page. wrong: number of instances whose load differed from the number of their leases. orphans: on the first
--     page, number of leases and waiters that were deleted because they had no timer; 0 on the other pages. registered:
--     number of instances
--   {0}   no such pool
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless: the first run has made all corrections
-- ERRORS  none
-- COST    O(L + count log N) for L leases and N instances. Every page counts all leases, because a count made for an
--         earlier page could be outdated. This takes about 1 us for each lease. The last page also reads the records of
--         all instances
local STATE, READY, DUE, WAITQ, IDS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST, COUNT = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local SCAN, ROUNDS = 1000, 100000
local fact = call('HGET', STATE, '#pool')
local registered = call('ZCARD', IDS)
if not fact then return {NOTHING} end
local refused = opened(fact)
if refused then return refused end
local pool = maintenance()
if pool.invalid == '#settings' then return corrupt(pool.invalid) end
while pool.invalid and pool.invalid ~= '#settings' do
  call('HDEL', STATE, pool.invalid)
  pool = maintenance(pool.now_us)
end
local first, count = tonumber(FIRST), tonumber(COUNT)

local page = call('ZRANGE', IDS, first, first + count - 1)
-- since_us holds the time probe_since_us (see pool.lua) of each half-open instance of the page. For each of these
-- instances, `before` holds the number of leases that were granted before this time.
local since_us, before = {}, {}
for _, id in ipairs(page) do
  local r = pool.read(id)
  if r and r.flags.half_open then since_us[id], before[id] = pool.extra(r).probe_since_us, 0 end
end
local held, waiting, orphans, instances, seen, cursor = {}, {}, {}, {}, {}, '0'
for _ = 1, ROUNDS do
  local scan = call('HSCAN', STATE, cursor, 'COUNT', SCAN)
  cursor = scan[1]
  for i = 1, #scan[2], 2 do
    local name, start = scan[2][i], string.sub(scan[2][i], 1, 1)
    if start == '@' and not seen[name] then
      seen[name] = true  -- a scan may return a field twice
      local record = scan[2][i + 1]
      local id, fence = match(record, LEASE)
      if not id then id, fence = match(record, GRANTED) end
      local is_waiting = match(record, WAITING)
      local timer = (is_waiting and 'W' or '') .. name
      local due_ms = (id or is_waiting) and call('ZSCORE', DUE, timer)
      if due_ms then pool.correct_timer(timer, tonumber(due_ms)) end
      if (id or is_waiting) and not due_ms then
        orphans[#orphans + 1] = name
      elseif is_waiting then
        waiting[name] = true
      elseif id then
        held[id] = (held[id] or 0) + 1
        if since_us[id] and tonumber(fence) < since_us[id] then before[id] = before[id] + 1 end
      end
    elseif start ~= '@' and start ~= '#' and start ~= '+' then
      instances[name] = true
    end
  end
  if cursor == '0' then break end
end

local next_rank = first + count < registered and first + count or 0
if first == 0 then
  for _, token in ipairs(orphans) do call('HDEL', STATE, token) end
  for _, token in ipairs(call('ZRANGE', WAITQ, 0, -1)) do
    if not waiting[token] then call('ZREM', WAITQ, token) end
  end
  for id in pairs(instances) do
    if not call('ZSCORE', IDS, id) then page[#page + 1] = id end  -- a removed instance that still has leases
  end
end
local wrong = 0
for _, id in ipairs(page) do
  local r = pool.read(id)
  if r then
    if r.load ~= (held[id] or 0) then wrong = wrong + 1 end
    r.load = held[id] or 0
    if before[id] then pool.extra(r).leases_before = before[id] end
    pool.restore_timers(r)
    pool.store(r)
  end
end
if next_rank == 0 then
  local load, cap, usable, unhealthy, warming, with = 0, 0, 0, 0, 0, {}
  for id in pairs(instances) do
    local r = pool.read(id)
    if r then
      load, cap = load + r.load, cap + (r.limit > 0 and r.cap or 0)
      for label in string.gmatch(r.labels == '-' and '' or r.labels, '[^,]+') do
        with[label] = with[label] or {}
        with[label][id] = true
      end
      local is_usable, is_unhealthy, is_warming = pool.counts(r.flags)
      usable, unhealthy, warming = usable + is_usable, unhealthy + is_unhealthy, warming + is_warming
    end
  end
  call('HSET', STATE, '#load', format('%d', load), '#cap', format('%d', cap))
  pool.recount(usable, unhealthy, warming)
  for _, id in ipairs(call('ZRANGE', READY, 0, -1)) do
    if not instances[id] then call('ZREM', READY, id) end
  end
  pool.sweep_away()
  for label, ids in pairs(with) do
    for _, id in ipairs(call('ZRANGE', READY .. '@' .. label, 0, -1)) do
      if not ids[id] then call('ZREM', READY .. '@' .. label, id) end
    end
  end
end
pool.dispatch()
pool.reschedule()
return {DONE, next_rank, wrong, first == 0 and #orphans or 0, registered}
