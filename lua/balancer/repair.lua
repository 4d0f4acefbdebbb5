-- repair: recompute the load of a page of instances from their leases, and write their records, indexes and timers anew.
-- When a heartbeat is due is not known elsewhere: where that was lost, the next heartbeat sets it again.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
-- ARGV
--   first     int   rank of the first instance of the page
--   count     int   instances per page
-- RETURNS
--   {1, next_rank, wrong, orphans, registered}   next_rank: 0 after the last page; wrong: instances whose load was not that of
--     their leases; orphans: leases and places in line dropped because nothing would have ended them, on the first page only
--   {0}   no such pool
--   {-3, fact}   other schema
-- REPEAT  finds nothing wrong any more
-- ERRORS  none
-- COST    O(L + count log N): every page counts all leases, some 1 us each, so that it is exact at its moment
local STATE, READY, DUE, WAITQ, IDS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST, COUNT = ARGV[1], ARGV[2]
--@include pool
--@include health
--@include maintenance

local SCAN, ROUNDS = 1000, 100000
local pool = call('HGET', STATE, '#pool')
local registered = call('ZCARD', IDS)
if not pool then return {NOTHING} end
if not match(pool, POOL) then return {OTHER_SCHEMA, pool} end
for _ = 1, 4 do
  local wrong = odd()
  if wrong then call('HDEL', STATE, wrong) end
end
local all = upkeep()
local first, count = tonumber(FIRST), tonumber(COUNT)

local page = call('ZRANGE', IDS, first, first + count - 1)
local since_us, old = {}, {}  -- of those on probation: when that began, and leases from before
for _, id in ipairs(page) do
  local r = all.read(id)
  if r and all.has(r, 'h') then since_us[id], old[id] = all.more(r).since_us, 0 end
end
local held, waiting, orphans, instances, seen, cursor = {}, {}, {}, {}, {}, '0'
for _ = 1, ROUNDS do
  local scan = call('HSCAN', STATE, cursor, 'COUNT', SCAN)
  cursor = scan[1]
  for i = 1, #scan[2], 2 do
    local field, start = scan[2][i], string.sub(scan[2][i], 1, 1)
    if start == '@' and not seen[field] then
      seen[field] = true  -- a scan may bring a field twice
      local kind, id, fence = match(scan[2][i + 1], '^([LGW]) (%S+) ?(%d*)')
      if kind and not call('ZSCORE', DUE, (kind == 'W' and 'W' or '') .. field) then
        orphans[#orphans + 1] = field
      elseif kind == 'W' then
        waiting[field] = true
      elseif kind then
        held[id] = (held[id] or 0) + 1
        if since_us[id] and (tonumber(fence) or 0) < since_us[id] then old[id] = old[id] + 1 end
      end
    elseif start ~= '@' and start ~= '#' and start ~= '+' then
      instances[field] = true
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
    if not call('ZSCORE', IDS, id) then page[#page + 1] = id end  -- removed, but for its leases
  end
end
local wrong = 0
for _, id in ipairs(page) do
  local r = all.read(id)
  if r then
    if r.load ~= (held[id] or 0) then wrong = wrong + 1 end
    r.load = held[id] or 0
    if old[id] then all.more(r).old = old[id] end
    all.rearm(r)
    all.store(r)
  end
end
if next_rank == 0 then
  local load, cap, usable, out, warming, with = 0, 0, 0, 0, 0, {}
  for id in pairs(instances) do
    local r = all.read(id)
    if r then
      load, cap = load + r.load, cap + (r.lim > 0 and r.cap or 0)
      for label in string.gmatch(r.labels == '-' and '' or r.labels, '[^,]+') do
        with[label] = with[label] or {}
        with[label][id] = true
      end
      local is_usable, is_out, is_warming = all.counts(r.flags)
      usable, out, warming = usable + is_usable, out + is_out, warming + is_warming
    end
  end
  call('HSET', STATE, '#load', format('%d', load), '#cap', format('%d', cap))
  all.recount(usable, out, warming)
  for _, id in ipairs(call('ZRANGE', READY, 0, -1)) do
    if not instances[id] then call('ZREM', READY, id) end
  end
  all.sweep_away()
  for label, ids in pairs(with) do
    for _, id in ipairs(call('ZRANGE', READY .. '@' .. label, 0, -1)) do
      if not ids[id] then call('ZREM', READY .. '@' .. label, id) end
    end
  end
end
all.pump()
all.retime()
return {DONE, next_rank, wrong, first == 0 and #orphans or 0, registered}
