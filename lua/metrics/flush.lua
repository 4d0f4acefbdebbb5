-- flush: add what one process recorded to the shared counts, exactly once.
-- KEYS
--   agents      ZSET    agentperf:{metrics:<shard>}:agents
--   settings    HASH    agentperf:{metrics:<shard>}:settings
--   writer      STRING  agentperf:{metrics:<shard>}:w:<writer>
--   totals...   HASH    agentperf:{metrics:<shard>}:total:<series>, one for each series
--   recents...  ZSET    agentperf:{metrics:<shard>}:recent:<series>, likewise
--   slows...    ZSET    agentperf:{metrics:<shard>}:slow:<series>, likewise
--   The slices, the indexes of parts and the keys of __other__ are named here, under the same tag.
-- ARGV
--   seq             int   number of this flush, rising for this writer and shard
--   writer_keep_ms  int   how long the number is remembered, ms
--   firm            int   1 makes the following lives those of the shard; 0 takes the shard's, where it has some
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
--   sent_ms         int   the server's time when this was sent, as far as the writer knows it, ms; -1 when it does not
--   names...        text  each series: <agent>, <agent>/<span> or <agent>#<measure>, percent-encoded
--   cells...        text  of each: series, age_ms of its oldest and its newest sample, width_ms of its slice, count of
--                         fields, field and value of each, its slowest raw samples, its other ones; samples as
--                         "<age_ms> <us>us|<outcome>", with spaces between
-- RETURNS
--   {1, now_ms, n, r}  counted; n executions went to __other__, r raw samples were too old to keep
--   {0, now_ms, 0, 0}  counted before: the number is not new
--   {-1, key, type, 0}  the key holds another type; nothing was written
-- REPEAT  the number of the flush is known: nothing is counted twice
-- ERRORS  none
-- COST    O(series x tiers x fields) + O(samples log N)
--@include slices
local agents, settings, writer = KEYS[1], KEYS[2], KEYS[3]
local seq, writer_keep_ms, firm = tonumber(ARGV[1]), ARGV[2], ARGV[3] == '1'
local keep_10s_ms, keep_1m_ms, keep_1h_ms, keep_1d_ms = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local recent_most, recent_keep_ms, slow_most, slow_keep_ms = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local agents_most, parts_most, errors_most, sample_tag = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), ARGV[15]
local sent_ms = tonumber(ARGV[16])
local names, cells = 17, 17 + (#KEYS - 3) / 3

local call = redis.call
local now = clock_ms()
-- Ages count from the sending: a request may wait, as before a server that was stopped for a while. Beyond the writer's
-- hour it is the clock that went ahead.
local base = (sent_ms >= 0 and sent_ms < now and now - sent_ms < tonumber(writer_keep_ms)) and sent_ms or now
local tag = string.sub(agents, 1, -7)
local series_count = cells - names
local KEEP = {keep_10s_ms, keep_1m_ms, keep_1h_ms, keep_1d_ms}
local LEAST = {min_us = true, first_ms = true}
local MOST = {max_us = true, last_ms = true}

local poisoned
local function holds(key, type)
  local found = call('TYPE', key).ok
  if found == type then return true end
  if found ~= 'none' and not poisoned then poisoned = {-1, key, found, 0} end
  return false
end

if holds(writer, 'string') and seq <= (tonumber(call('GET', writer)) or 0) then return {0, now, 0, 0} end
holds(agents, 'zset')
-- Readers look where the last writer's settings say that slices are.
local settled = holds(settings, 'hash') and call('HMGET', settings, '10s', '1m', '1h', '1d')
for t = 1, 4 do
  local stored = settled and tonumber(settled[t])
  if not stored then settled = false
  elseif not firm then KEEP[t] = stored end
end
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
    local measure = string.sub(member, 1, 1) == '#'  -- there are two of them, and they stand for no span
    if known.size >= most and member ~= OTHER and member ~= '/' .. OTHER and not measure then return false end
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
  local one = {total = KEYS[3 + i], recent = KEYS[3 + series_count + i], slow = KEYS[3 + 2 * series_count + i]}
  local moved = not admit(agents, agent, agents_most)
  if moved then agent = OTHER; admit(agents, agent, agents_most) end
  if part ~= '' then
    one.index = tag .. 'parts:' .. agent
    if not admit(one.index, part, parts_most) then part = '/' .. OTHER; moved = true; admit(one.index, part, parts_most) end
  end
  one.agent, one.part, one.name, one.moved, one.fresh, one.slowest = agent, part, agent .. part, moved, {}, {}
  if moved then
    one.total, one.recent, one.slow = tag .. 'total:' .. one.name, tag .. 'recent:' .. one.name, tag .. 'slow:' .. one.name
  end
  series[i] = one
end
if poisoned then return poisoned end

-- What is to be added to each key, in memory first, so that every read and check comes before the first write. A cell
-- adds the same to the total and to its slices, so keys share one `sum` until another cell adds to the same key.
local sums, order, expiries = {}, {}, {}
local function put(sum, field, value)
  local values = sum.values
  local old = values[field]
  if not old then
    values[field] = value
    sum.names[#sum.names + 1] = field
  elseif LEAST[field] then if value < old then values[field] = value end
  elseif MOST[field] then if value > old then values[field] = value end
  else values[field] = old + value end
end
local function add(key, sum, expires)
  local known = sums[key]
  if not known then
    sums[key] = sum
    order[#order + 1] = key
    expiries[key] = expires
    return
  end
  if not known.own then
    local own = {names = {}, values = {}, own = true}
    for i, field in ipairs(known.names) do own.names[i], own.values[field] = field, known.values[field] end
    sums[key] = own
    known = own
  end
  for _, field in ipairs(sum.names) do put(known, field, sum.values[field]) end
end

-- Error types and models beyond the guard are counted under __other__, in every slice alike: err:<type>, and
-- mdl:<model>:<measure>. One is known when the total of the series has its field.
local guards = {}
local function kind(total, field)
  local guard = guards[total]
  if not guard then guard = {kinds = {}}; guards[total] = guard end
  local prefix, word, rest = string.match(field, '^(mdl:)([^:]*)(:.*)$')
  local base, counter = field, 'types'
  if prefix then base, counter = prefix .. word .. ':n', 'models' else prefix, rest = 'err:', '' end
  local known = guard.kinds[base]
  if known == nil then
    known = false
    if holds(total, 'hash') then
      local got = call('HMGET', total, base, counter)
      guard[counter] = guard[counter] or tonumber(got[2])
      known = got[1] and true
    end
    guard[counter] = guard[counter] or 0
    if not known and guard[counter] < errors_most then
      known = true
      guard[counter] = guard[counter] + 1
      add(total, {names = {counter}, values = {[counter] = 1}, own = true})
    end
    guard.kinds[base] = known
  end
  return known and field or prefix .. OTHER .. rest
end

local sampled, outdated = 0, 0
local function sample(one, texts, from, to, slow)
  local fresh, slowest = one.fresh, one.slowest
  for age, text in string.gmatch(texts, '(%d+) (%S+)') do
    local ms = base - age
    if ms < from then ms = from elseif ms > to then ms = to end
    if ms <= now - recent_keep_ms then
      outdated = outdated + 1
    else
      sampled = sampled + 1
      local size = #fresh
      local member = ms .. '|' .. text .. '|' .. sample_tag .. '-' .. sampled
      fresh[size + 1], fresh[size + 2] = ms, member
      if slow then
        size = #slowest
        slowest[size + 1], slowest[size + 2] = tonumber(string.match(text, '^%d+')), member
      end
    end
  end
end

local at, last, redirected = cells, #ARGV, 0
while at <= last do
  local one = series[tonumber(ARGV[at])]
  local oldest, newest, width = base - ARGV[at + 1], base - ARGV[at + 2], tonumber(ARGV[at + 3])
  local centre = (oldest + newest) / 2
  local from = floor(centre / width) * width
  local to = from + width - 1
  local first_ms, last_ms = math.max(oldest, from), math.min(newest, to)
  seen(agents, one.agent, last_ms)
  if one.index then seen(one.index, one.part, last_ms) end
  local count = tonumber(ARGV[at + 4])
  at = at + 5
  local sum = {names = {}, values = {}}
  for f = at, at + 2 * count - 2, 2 do
    local field = ARGV[f]
    if string.find(field, ':', 1, true) and not string.find(field, '^h:') then field = kind(one.total, field) end
    put(sum, field, tonumber(ARGV[f + 1]))
  end
  put(sum, 'first_ms', first_ms)
  put(sum, 'last_ms', last_ms)
  if one.moved then redirected = redirected + (sum.values.n or 0) end
  for t = 1, 4 do
    local tier = TIERS[t]
    local start = floor(centre / tier[WIDTH]) * tier[WIDTH]
    local expires = start + tier[WIDTH] + KEEP[t]
    if tier[WIDTH] >= width and KEEP[t] > 0 and expires > now then
      add(slice_key(tag, tier, start, one.name), sum, expires)
    end
  end
  add(one.total, sum)
  at = at + 2 * count
  sample(one, ARGV[at], from, to, true)
  sample(one, ARGV[at + 1], from, to, false)
  at = at + 2
end

local writes = {}
for _, key in ipairs(order) do
  local names, values = sums[key].names, sums[key].values
  local stored = {}
  if holds(key, 'hash') then
    stored = call('HMGET', key, unpack(names))
    expiries[key] = nil  -- set when the slice was created
  end
  local write = {}
  for i = 1, #names do
    local field, value = names[i], values[names[i]]
    local old = stored[i] and tonumber(stored[i])
    if old then
      if LEAST[field] then if old < value then value = old end
      elseif MOST[field] then if old > value then value = old end
      else value = old + value end
    end
    write[2 * i - 1], write[2 * i] = field, value  -- a number: redis.call writes it whole, unlike tostring
  end
  writes[key] = write
end
for i = 1, series_count do
  local one = series[i]
  if #one.fresh > 0 then holds(one.recent, 'zset'); holds(one.slow, 'zset') end
end
if poisoned then return poisoned end

-- The number first: it is what a full server refuses, and then nothing was written.
call('SET', writer, whole(seq), 'PX', writer_keep_ms)
for _, key in ipairs(order) do
  call('HSET', key, unpack(writes[key]))
  if expiries[key] then call('PEXPIREAT', key, whole(expiries[key])) end
end
for t = 1, 4 do
  if not settled or tonumber(settled[t]) ~= KEEP[t] then call('HSET', settings, TIERS[t][NAME], KEEP[t]) end
end
for index, known in pairs(indexes) do
  for member, ms in pairs(known.seen) do call('ZADD', index, 'GT', whole(ms), member) end
end
local function zadd(key, flat)
  for first = 1, #flat, 4000 do call('ZADD', key, unpack(flat, first, math.min(first + 3999, #flat))) end
end
for i = 1, series_count do
  local one = series[i]
  if #one.fresh > 0 then
    zadd(one.recent, one.fresh)
    call('ZREMRANGEBYSCORE', one.recent, '-inf', now - recent_keep_ms)
    call('ZREMRANGEBYRANK', one.recent, 0, -recent_most - 1)
    call('PEXPIRE', one.recent, recent_keep_ms)
    local floor_us = -1  -- what is not slower than the slowest fifty is not tried
    if call('ZCARD', one.slow) >= slow_most then floor_us = tonumber(call('ZRANGE', one.slow, 0, 0, 'WITHSCORES')[2]) end
    local slower = {}
    for s = 1, #one.slowest, 2 do
      if one.slowest[s] > floor_us then slower[#slower + 1] = one.slowest[s]; slower[#slower + 1] = one.slowest[s + 1] end
    end
    if #slower > 0 then
      zadd(one.slow, slower)
      call('ZREMRANGEBYRANK', one.slow, 0, -slow_most - 1)
      for _, member in ipairs(call('ZRANGE', one.slow, 0, -1)) do
        if tonumber(string.match(member, '^%d+') or 0) <= now - slow_keep_ms then call('ZREM', one.slow, member) end
      end
      call('PEXPIRE', one.slow, slow_keep_ms)
    end
  end
end
return {1, now, redirected, outdated}
