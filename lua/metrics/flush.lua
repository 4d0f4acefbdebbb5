-- flush: add what one process recorded to the shared counts, exactly once.
-- KEYS
--   agents      ZSET    agentperf:{metrics:<shard>}:agents
--   writer      STRING  agentperf:{metrics:<shard>}:w:<writer>
--   totals...   HASH    agentperf:{metrics:<shard>}:total:<series>, one for each series
--   recents...  ZSET    agentperf:{metrics:<shard>}:recent:<series>, likewise
--   slows...    ZSET    agentperf:{metrics:<shard>}:slow:<series>, likewise
--   The slices, the indexes of parts and the keys of __other__ are named here, under the same tag.
-- ARGV
--   seq             int   number of this flush, rising for this writer and shard
--   writer_keep_ms  int   how long the number is remembered, ms
--   keep_10s_ms     int   life of a slice after its end, ms; 0 writes none
--   keep_1m_ms      int   likewise
--   keep_1h_ms      int   likewise
--   keep_1d_ms      int   likewise
--   recent_most     int   raw samples kept for a series
--   recent_keep_ms  int   and how long, ms
--   slow_most       int   slowest samples kept for a series
--   slow_keep_ms    int   and how long, ms
--   agents_most     int   agents of this shard; what comes beyond is counted under __other__
--   parts_most      int   spans of an agent; likewise
--   errors_most     int   error types, and models, of a series; likewise
--   sample_tag      text  makes the members of this flush unique
--   names...        text  each series: <agent>, <agent>/<span> or <agent>#<measure>, percent-encoded
--   cells...        text  of each: series, age_ms of its oldest and its newest sample, width_ms of its slice, count of
--                         fields, field and value of each, count of raw samples, age_ms, us and outcome of each
-- RETURNS
--   {1, now_ms, n}      counted; n samples went to __other__
--   {0, now_ms, 0}      counted before: the number is not new
--   {-1, key, type}     the key holds another type; nothing was written
-- REPEAT  the number of the flush is known: nothing is counted twice
-- ERRORS  none
-- COST    O(series x tiers x fields) + O(samples log N)
--@include slices
local agents, writer = KEYS[1], KEYS[2]
local seq, writer_keep_ms = tonumber(ARGV[1]), ARGV[2]
local keep_10s_ms, keep_1m_ms, keep_1h_ms, keep_1d_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local recent_most, recent_keep_ms, slow_most, slow_keep_ms = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local agents_most, parts_most, errors_most, sample_tag = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13]), ARGV[14]
local names, cells = 15, 15 + (#KEYS - 2) / 3

local call = redis.call
local now = clock_ms()
local tag = string.sub(agents, 1, -7)
local series_count = cells - names
local KEEP = {keep_10s_ms, keep_1m_ms, keep_1h_ms, keep_1d_ms}
local LEAST = {min_us = true, first_ms = true}
local MOST = {max_us = true, last_ms = true}

local poisoned
local function holds(key, type)
  local found = call('TYPE', key).ok
  if found == type then return true end
  if found ~= 'none' and not poisoned then poisoned = {-1, key, found} end
  return false
end

if holds(writer, 'string') and seq <= (tonumber(call('GET', writer)) or 0) then return {0, now, 0} end
holds(agents, 'zset')
if poisoned then return poisoned end

-- Which series each name stands for: itself, or __other__ where the guard says so.
local series, indexes = {}, {}
local function admit(index, member, most)  -- is there room for one more?
  local known = indexes[index]
  if not known then
    known = {size = holds(index, 'zset') and call('ZCARD', index) or 0, seen = {}}
    indexes[index] = known
  end
  if poisoned then return false end
  if known.seen[member] then return true end
  if not (known.size > 0 and call('ZSCORE', index, member)) then
    if known.size >= most and member ~= OTHER and member ~= '/' .. OTHER then return false end
    known.size = known.size + 1
  end
  known.seen[member] = 0
  return true
end
local function seen(index, member, ms)
  local latest = indexes[index].seen
  if (latest[member] or 0) < ms then latest[member] = ms end
end

for i = 1, series_count do
  local name = ARGV[names + i - 1]
  local agent, part = string.match(name, '^([^/#]+)(.*)$')
  local one = {total = KEYS[2 + i], recent = KEYS[2 + series_count + i], slow = KEYS[2 + 2 * series_count + i]}
  local moved = not admit(agents, agent, agents_most)
  if moved then agent = OTHER; admit(agents, agent, agents_most) end
  if part ~= '' then
    one.index = tag .. 'parts:' .. agent
    if not admit(one.index, part, parts_most) then part = '/' .. OTHER; moved = true; admit(one.index, part, parts_most) end
  end
  one.agent, one.part, one.name, one.moved, one.samples = agent, part, agent .. part, moved, {}
  if moved then
    one.total, one.recent, one.slow = tag .. 'total:' .. one.name, tag .. 'recent:' .. one.name, tag .. 'slow:' .. one.name
  end
  series[i] = one
end
if poisoned then return poisoned end

-- Add up in memory, each key once, so that every read and check comes before the first write.
local sums, order = {}, {}
local function into(key, expires)
  local sum = sums[key]
  if not sum then
    sum = {fields = {}, expires = expires}
    sums[key] = sum
    order[#order + 1] = key
  end
  return sum.fields
end
local function add(fields, field, value)
  local old = fields[field]
  if not old then fields[field] = value
  elseif LEAST[field] then if value < old then fields[field] = value end
  elseif MOST[field] then if value > old then fields[field] = value end
  else fields[field] = old + value end
end

-- Error types and models beyond the guard are counted under __other__, in every slice alike: err:<type>, and
-- mdl:<model>:<measure>. One is known when the total of the series has its field.
local function kind(one, field)
  one.kinds = one.kinds or {}
  local prefix, word, rest = string.match(field, '^(mdl:)([^:]*)(:.*)$')
  local base, counter = field, 'types'
  if prefix then base, counter = prefix .. word .. ':n', 'models' else prefix, rest = 'err:', '' end
  local known = one.kinds[base]
  if known == nil then
    known = false
    if holds(one.total, 'hash') then
      local got = call('HMGET', one.total, base, counter)
      one[counter] = one[counter] or tonumber(got[2])
      known = got[1] and true
    end
    one[counter] = one[counter] or 0
    if not known and one[counter] < errors_most then
      known = true
      one[counter] = one[counter] + 1
      add(into(one.total), counter, 1)
    end
    one.kinds[base] = known
  end
  return known and field or prefix .. OTHER .. rest
end

local at, last, redirected = cells, #ARGV, 0
while at <= last do
  local one = series[tonumber(ARGV[at])]
  local oldest, newest, width = now - ARGV[at + 1], now - ARGV[at + 2], tonumber(ARGV[at + 3])
  local centre = (oldest + newest) / 2
  local from = floor(centre / width) * width
  local to = from + width - 1
  local first_ms, last_ms = math.max(oldest, from), math.min(newest, to)
  seen(agents, one.agent, last_ms)
  if one.index then seen(one.index, one.part, last_ms) end
  local targets = {into(one.total)}
  add(targets[1], 'first_ms', first_ms)
  for t = 1, 4 do
    local tier = TIERS[t]
    local start = floor(centre / tier[WIDTH]) * tier[WIDTH]
    local expires = start + tier[WIDTH] + KEEP[t]
    if tier[WIDTH] >= width and KEEP[t] > 0 and expires > now then
      targets[#targets + 1] = into(slice_key(tag, tier, start, one.name), expires)
    end
  end
  for i = 1, #targets do add(targets[i], 'last_ms', last_ms) end
  local count = tonumber(ARGV[at + 4])
  at = at + 5
  for f = at, at + 2 * count - 2, 2 do
    local field, value = ARGV[f], tonumber(ARGV[f + 1])
    if string.find(field, '^err:') or string.find(field, '^mdl:') then field = kind(one, field) end
    for i = 1, #targets do add(targets[i], field, value) end
    if one.moved and field == 'n' then redirected = redirected + value end
  end
  at = at + 2 * count
  count = tonumber(ARGV[at])
  at = at + 1
  for s = at, at + 3 * count - 3, 3 do
    local ms = math.min(math.max(now - ARGV[s], from), to)
    if ms > now - recent_keep_ms then one.samples[#one.samples + 1] = {ms, tonumber(ARGV[s + 1]), ARGV[s + 2]} end
  end
  at = at + 3 * count
end

for _, key in ipairs(order) do
  local sum = sums[key]
  if holds(key, 'hash') then
    sum.expires = nil  -- set when the slice was created
    local wanted = {}
    for field in pairs(sum.fields) do wanted[#wanted + 1] = field end
    for first = 1, #wanted, 2000 do
      local got = call('HMGET', key, unpack(wanted, first, math.min(first + 1999, #wanted)))
      for i = 1, #got do
        local stored = tonumber(got[i])
        if stored then add(sum.fields, wanted[first + i - 1], stored) end
      end
    end
  end
end
for i = 1, series_count do
  if #series[i].samples > 0 then holds(series[i].recent, 'zset'); holds(series[i].slow, 'zset') end
end
if poisoned then return poisoned end

-- The number first: it is what a full server refuses, and then nothing was written.
call('SET', writer, whole(seq), 'PX', writer_keep_ms)
for _, key in ipairs(order) do
  local sum = sums[key]
  local flat = {}
  for field, value in pairs(sum.fields) do
    flat[#flat + 1] = field
    flat[#flat + 1] = whole(value)
    if #flat >= 4000 then call('HSET', key, unpack(flat)); flat = {} end
  end
  if #flat > 0 then call('HSET', key, unpack(flat)) end
  if sum.expires then call('PEXPIREAT', key, whole(sum.expires)) end
end
for index, known in pairs(indexes) do
  for member, ms in pairs(known.seen) do call('ZADD', index, 'GT', whole(ms), member) end
end
for i = 1, series_count do
  local one = series[i]
  local count = #one.samples
  if count > 0 then
    local floor_us = -1  -- what is not slower than the slowest fifty is not tried
    if call('ZCARD', one.slow) >= slow_most then floor_us = tonumber(call('ZRANGE', one.slow, 0, 0, 'WITHSCORES')[2]) end
    local recent, slow = {}, {}
    for s = 1, count do
      local sample = one.samples[s]
      local us = sample[2]
      local member = format('%.0f|%d.%06ds|%s|%s-%d-%d', sample[1], floor(us / 1000000), us % 1000000, sample[3], sample_tag, i, s)
      recent[#recent + 1] = sample[1]
      recent[#recent + 1] = member
      if us > floor_us then slow[#slow + 1] = us; slow[#slow + 1] = member end
      if #recent >= 4000 or s == count then call('ZADD', one.recent, unpack(recent)); recent = {} end
      if #slow >= 4000 or (s == count and #slow > 0) then call('ZADD', one.slow, unpack(slow)); slow = {} end
    end
    call('ZREMRANGEBYSCORE', one.recent, '-inf', now - recent_keep_ms)
    call('ZREMRANGEBYRANK', one.recent, 0, -recent_most - 1)
    call('PEXPIRE', one.recent, recent_keep_ms)
    call('ZREMRANGEBYRANK', one.slow, 0, -slow_most - 1)
    for _, member in ipairs(call('ZRANGE', one.slow, 0, -1)) do
      if tonumber(string.match(member, '^%d+') or 0) <= now - slow_keep_ms then call('ZREM', one.slow, member) end
    end
    call('PEXPIRE', one.slow, slow_keep_ms)
  end
end
return {1, now, redirected}
