-- flush: add the records of one process to the shared counts, exactly once.
-- KEYS
--   agents          ZSET    agentperf:{metrics:<shard>}:agents
--   settings        HASH    agentperf:{metrics:<shard>}:settings
--   writer          STRING  agentperf:{metrics:<shard>}:w:<writer>
--   totals...       HASH    agentperf:{metrics:<shard>}:total:<series>, one for each series
--   latests...      LIST    agentperf:{metrics:<shard>}:latest:<series>, one for each series
--   slows...        ZSET    agentperf:{metrics:<shard>}:slow:<series>, one for each series
--   Other keys under the same hash tag are computed here: slices, lists of closed slices, the keys of __other__ and of
--   names that give way (see idle_ms), and for each agent the index of its parts. The parts of an agent are its spans
--   and measures.
-- ARGV
--   seq             int     idempotency key of this flush, a number that rises with each flush of this writer to this
--                           shard
--   writer_keep_ms  int     how long the server remembers seq, ms
--   firm            int     1: the next four TTLs apply and are stored for the shard. 0: the stored TTLs apply instead.
--                           If not all four are stored, 0 has the same effect as 1
--   keep_10s_ms     int     TTL of a slice of 10 s, counted from its end, ms; 0: no such slices are written
--   keep_1m_ms      int     as keep_10s_ms, for a slice of 1 min
--   keep_1h_ms      int     as keep_10s_ms, for a slice of 1 h
--   keep_1d_ms      int     as keep_10s_ms, for a slice of 1 day
--   max_recent      int     max number of raw samples of a series
--   recent_keep_ms  int     TTL of raw samples, ms
--   max_slow        int     max number of slowest samples of a series
--   slow_keep_ms    int     TTL of slowest samples, ms
--   max_agents      int     max agents of this shard; further agents are counted under __other__
--   max_parts       int     if an agent has this many parts, further spans are counted under __other__
--   max_errors      int     max number of error types of a series, and also of its models; further error types and
--                           models are counted under __other__
--   idle_ms         int     time without use after which a name may give way, ms. A name is an agent, a span, an error
--                           type or a model. At a limit, a new name takes the place of an old name that may give way,
--                           and the counts of the old name are added to __other__. If an agent gives way, the counts of
--                           its spans are added to the span __other__ of the agent __other__. For error types and
--                           models, the time is rounded up to whole days
--   sample_tag      text    makes the sorted-set members of this flush unique
--   sent_ms         int     the server's time when this flush was sent, ms; -1 if the writer does not know it
--   names...        text    the name of each series: <agent>, <agent>/<span> or <agent>#<measure>, percent-encoded
--   cells...        any     several values for each accumulator. An accumulator has the sums and raw samples of one
--                           series in one slice. The values are: position of the series in names (the first is 1), age
--                           of the oldest sample, age of the newest sample, width of the slice, number of fields, name
--                           and value of each field, slowest raw samples, other raw samples. Raw samples are separated
--                           by spaces; each is "<age> <us>us|<outcome>". Ages and the width are in ms; ages count back
--                           from sent_ms
-- RETURNS
--   {1, now_ms, n, r}  counted. n: number of executions that were counted under __other__; r: number of raw samples
--                      that were too old to keep
--   {0, now_ms, 0, 0}  this flush was counted before: seq is not new
-- REPEAT  a second delivery finds seq known, so nothing is counted twice
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a field that is no number; nothing was written
-- COST    O(series x widths of slices x fields) + O(samples log N) for N samples of a series. Closing a slice adds
--         O(fields). A list of closed slices that gets late samples adds O(256 lines). At a limit, each name that gives
--         way adds O(fields). One flush removes at most 16 agents. Together, these agents have at most as many parts as
--         one agent can have: max_parts, the span __other__ and two measures. The flush also removes at most 16 spans
--         of each agent that stays. Of each series, it removes at most max_errors error types and max_errors models
--@include corrupt
--@include whole_number
--@include slices
local AGENTS, SETTINGS, WRITER = KEYS[1], KEYS[2], KEYS[3]
local SEQ, WRITER_KEEP_MS, FIRM = tonumber(ARGV[1]), ARGV[2], ARGV[3] == '1'
local KEEP_10S_MS, KEEP_1M_MS = tonumber(ARGV[4]), tonumber(ARGV[5])
local KEEP_1H_MS, KEEP_1D_MS = tonumber(ARGV[6]), tonumber(ARGV[7])
local MAX_RECENT, RECENT_KEEP_MS = tonumber(ARGV[8]), tonumber(ARGV[9])
local MAX_SLOW, SLOW_KEEP_MS = tonumber(ARGV[10]), tonumber(ARGV[11])
local MAX_AGENTS, MAX_PARTS, MAX_ERRORS = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local IDLE_MS, SAMPLE_TAG, SENT_MS = tonumber(ARGV[15]), ARGV[16], tonumber(ARGV[17])
local NAMES, CELLS = 18, 18 + math.floor((#KEYS - 3) / 3)  -- floor: a Cluster has one more key (`absent` in keys.py)

local call = redis.call
local now = clock_ms()
-- A request may wait, for example while the server is stopped. So ages count back from the time when the request was
-- sent. No request waits longer than WRITER_KEEP_MS. If a request seems to have waited longer, the server's clock was
-- set forward. In this case, ages count back from now.
local base = (SENT_MS >= 0 and SENT_MS < now and now - SENT_MS < tonumber(WRITER_KEEP_MS)) and SENT_MS or now
local tag = string.sub(AGENTS, 1, -7)
local series_count = CELLS - NAMES
local KEEP = {KEEP_10S_MS, KEEP_1M_MS, KEEP_1H_MS, KEEP_1D_MS}
local EXTREME = {min_us = 'min', first_ms = 'min', max_us = 'max', last_ms = 'max'}

local wrong_key, wrong_type
local function holds(key, type)
  local found = call('TYPE', key).ok
  if found == type then return true end
  if found ~= 'none' and not wrong_key then wrong_key, wrong_type = key, 'a ' .. found end
  return false
end

-- If the key has a wrong type, this read fails, and the type is read next. So the usual case needs only one call.
local known_seq = redis.pcall('GET', WRITER)
if type(known_seq) == 'string' then
  known_seq = whole_number(known_seq)
  if not known_seq then return corrupt(WRITER, 'a text that is no number') end
  if SEQ <= known_seq then return {0, now, 0, 0} end
elseif known_seq then
  holds(WRITER, 'string')
end
-- Readers compute from the stored TTLs which slices exist, so writers must use the stored TTLs too.
local stored_keep, is_current, is_complete = settings_ttls(SETTINGS)
if not stored_keep and not (FIRM and is_current == WRONG_TTLS) then return corrupt(SETTINGS, is_current) end
if stored_keep and is_complete and not FIRM then KEEP = stored_keep end
if wrong_key then return corrupt(wrong_key, wrong_type) end

-- Most flushes read and write no closed slices. They would take 3 % longer if they created these functions.
local function closed_functions()
--@include sums
--@include closed
  return closed_key, stamp_of, add_head, add_line, closed_range, closed_lines, encode_name
end

-- A name is counted under its own series or, if it is beyond a limit, under __other__.
local series, indexes, leaving = {}, {}, {}
local present  -- the agents and parts that this flush counts; they do not give way
local leaving_parts = 0  -- number of the parts of all agents that give way
local function parts_of(agent)
  local key = tag .. 'parts:' .. agent
  return call('TYPE', key).ok == 'zset' and call('ZRANGE', key, 0, -1) or {}
end
local function make_room(index, known)  -- take an idle member out of a full index
  if not known.idle then
    known.idle = call('ZRANGEBYSCORE', index, '-inf', '(' .. whole(now - IDLE_MS), 'WITHSCORES', 'LIMIT', 0, 16)
    known.next = 1
  end
  if not present then
    present = {}
    for i = NAMES, CELLS - 1 do
      local agent, part = string.match(ARGV[i], '^([^/#]+)(.*)$')
      present[agent], present[tag .. 'parts:' .. agent .. part] = true, true
      present[tag .. 'parts:' .. OTHER .. part] = true  -- in case the agent is counted under __other__
    end
  end
  while known.idle[known.next] do
    local member, ms = known.idle[known.next], tonumber(known.idle[known.next + 1])
    known.next = known.next + 2
    local other = member == OTHER or member == '/' .. OTHER or string.sub(member, 1, 1) == '#'
    if not (other or known.seen[member] or present[index == AGENTS and member or index .. member]) then
      local parts = index == AGENTS and parts_of(member) or {}
      -- This flush must read the counts of every part of the agents that give way. So the number of these parts is
      -- limited. Only the first agent may exceed the limit. If a further agent would exceed the limit, it gives way in
      -- a later flush.
      if #parts == 0 or leaving_parts == 0 or leaving_parts + #parts <= MAX_PARTS then
        leaving_parts = leaving_parts + #parts
        known.size = known.size - 1
        leaving[#leaving + 1] = {index = index, member = member, ms = ms, parts = parts}
        return true
      end
    end
  end
  return false
end
local function admit(index, member, limit)  -- returns whether the index has the member, or has room for it
  local known = indexes[index]
  if not known then
    local size = redis.pcall('ZCARD', index)
    if type(size) ~= 'number' then
      holds(index, 'zset')
      size = 0
    end
    known = {size = size, seen = {}}
    indexes[index] = known
  end
  if wrong_key then return false end
  if known.seen[member] then return true end
  if not (known.size > 0 and call('ZSCORE', index, member)) then
    local measure = string.sub(member, 1, 1) == '#'  -- an agent's two measures are admitted even at the limit
    if known.size >= limit and member ~= OTHER and member ~= '/' .. OTHER and not measure
      and not make_room(index, known) then return false end
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
  local name = ARGV[NAMES + i - 1]
  local agent, part = string.match(name, '^([^/#]+)(.*)$')
  local one = {total = KEYS[3 + i], latest = KEYS[3 + series_count + i], slow = KEYS[3 + 2 * series_count + i]}
  local moved = not admit(AGENTS, agent, MAX_AGENTS)
  if moved then agent = OTHER; admit(AGENTS, agent, MAX_AGENTS) end
  if part ~= '' then
    one.index = tag .. 'parts:' .. agent
    if not admit(one.index, part, MAX_PARTS) then
      part, moved = '/' .. OTHER, true
      admit(one.index, part, MAX_PARTS)
    end
  end
  one.agent, one.part, one.name, one.moved, one.fresh, one.slowest = agent, part, agent .. part, moved, {}, {}
  if moved then
    one.total, one.latest = tag .. 'total:' .. one.name, tag .. 'latest:' .. one.name
    one.slow = tag .. 'slow:' .. one.name
  end
  series[i] = one
end
if wrong_key then return corrupt(wrong_key, wrong_type) end

-- `sums` maps each key to a table of the sums to add to this key. All sums are first collected in memory, so that every
-- read and check precedes the first write. An accumulator adds the same sums to the total of its series and to several
-- slices. So at first, the keys of the total and of these slices share one table. When a second accumulator adds to one
-- of these keys, this key gets a table of its own.
local sums, order, expiries = {}, {}, {}
local function aggregate(sum, field, value)
  local values = sum.values
  local old = values[field]
  if not old then
    values[field] = value
    sum.names[#sum.names + 1] = field
  elseif not EXTREME[field] then values[field] = old + value
  elseif EXTREME[field] == 'min' then if value < old then values[field] = value end
  elseif value > old then values[field] = value end
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
  for _, field in ipairs(sum.names) do aggregate(known, field, sum.values[field]) end
end

-- Error types (fields err:<type>) and models (fields mdl:<model>:<measure>) beyond their limit are counted under
-- __other__, in the total and in every slice. A type or model is known if the total of the series has its field. At the
-- limit, a new type or model takes the place of an idle one. A type or model is idle if it was used neither today nor
-- on the N days before today. N is IDLE_MS in days, rounded up.
local guards, gone_fields = {}, {}
-- The time when a type or model was last used is not stored. But each slice of 1 day has a field for every type and
-- model that was used on that day. So the script reads these slices. If slices of 1 day are kept for less than IDLE_MS,
-- no type or model counts as idle.
local mentioned  -- the arguments of this flush; a type or model among them does not give way
local function take_out_idle(total, guard, prefix)
  local idle = guard[prefix]
  if not mentioned then
    mentioned = {}
    for i = CELLS, #ARGV do mentioned[ARGV[i]] = true end
  end
  if not idle then
    idle = {}
    guard[prefix], guard.stored = idle, call('HGETALL', total)
    local fields = {}
    for i = 1, #guard.stored, 2 do
      local word = string.match(guard.stored[i], prefix == 'mdl:' and '^mdl:([^:]*):n$' or '^err:(.*)$')
      if word and word ~= OTHER and not mentioned[guard.stored[i]] then fields[#fields + 1] = guard.stored[i] end
    end
    local name, day = string.sub(total, #tag + 7), TIERS[4]
    local closed_key, _, add_head, _, closed_range, closed_lines = closed_functions()
    local used, closed = {}, {}
    local today, days = floor(now / day[WIDTH]) * day[WIDTH], math.ceil(IDLE_MS / day[WIDTH])
    local range = closed_range(day, today - days * day[WIDTH])
    for ago = 0, days do
      local start = today - ago * day[WIDTH]
      local key = slice_key(tag, day, start, name)
      range.last, range.at[stamp(start, day[SHOWN])] = today, true
      if #fields > 0 and call('TYPE', key).ok == 'hash' then
        for i, value in ipairs(call('HMGET', key, unpack(fields))) do used[i] = used[i] or value end
      end
    end
    local key = closed_key(tag, day, name)
    if #fields > 0 and call('TYPE', key).ok == 'list' then
      pcall(function()  -- an error means that another program has written a line; later lines are skipped
        for _, line in ipairs(closed_lines(key, range, now)) do add_head(line, closed) end
      end)
      for i, field in ipairs(fields) do used[i] = used[i] or closed[field] end
    end
    for i, field in ipairs(fields) do
      if not used[i] and KEEP[4] >= IDLE_MS then idle[#idle + 1] = field end
    end
  end
  while #idle > 0 do
    local base = table.remove(idle)
    if guard.kinds[base] == nil then  -- no name that gives way has added counts to this field
      guard.kinds[base] = false
      local start = prefix == 'mdl:' and string.sub(base, 1, -2) or base
      local moved, fields = {names = {}, values = {}, own = true}, {total}
      for i = 1, #guard.stored, 2 do
        local field, value = guard.stored[i], counter(guard.stored[i + 1])
        if field == start or prefix == 'mdl:' and string.sub(field, 1, #start) == start then
          fields[#fields + 1] = field
          local rest = prefix == 'mdl:' and string.sub(field, #start) or ''
          if value then aggregate(moved, prefix .. OTHER .. rest, value) end
        end
      end
      add(total, moved)
      gone_fields[#gone_fields + 1] = fields
      return true
    end
  end
  return false
end
local function limited(total, field)
  local guard = guards[total]
  if not guard then guard = {kinds = {}}; guards[total] = guard end
  local prefix, word, rest = string.match(field, '^(mdl:)([^:]*)(:.*)$')
  local base, kind = field, 'types'
  if prefix then base, kind = prefix .. word .. ':n', 'models'
  else prefix, word, rest = 'err:', string.sub(field, 5), '' end
  if word == OTHER then return field end
  local known = guard.kinds[base]
  if known == nil then
    known = false
    if holds(total, 'hash') then
      local got = call('HMGET', total, base, kind)
      guard[kind] = guard[kind] or whole_number(got[2], 0)
      if not guard[kind] then wrong_key, wrong_type = total, 'a field that is no number' end
      known = got[1] and true
    end
    guard[kind] = guard[kind] or 0
    if not known and guard[kind] < MAX_ERRORS then
      known = true
      guard[kind] = guard[kind] + 1
      add(total, {names = {kind}, values = {[kind] = 1}, own = true})
    elseif not known then
      known = take_out_idle(total, guard, prefix)
    end
    guard.kinds[base] = known
  end
  return known and field or prefix .. OTHER .. rest
end

-- The counts of a name that gives way are added to __other__, so the sum over all names stays the same. If another
-- program has written a value that is no number, the value is dropped, since it would damage __other__ too. The slices
-- of the old name stay until they expire.
local gone = {}
local function give_way(name, other)  -- both are names of series
  for _, kind in ipairs({'total:', 'latest:', 'slow:'}) do gone[#gone + 1] = tag .. kind .. name end
  if call('TYPE', tag .. 'total:' .. name).ok == 'hash' then
    local counted, sum = call('HGETALL', tag .. 'total:' .. name), {names = {}, values = {}, own = true}
    for i = 1, #counted, 2 do
      local field, value = counted[i], counter(counted[i + 1])
      if value and field ~= 'types' and field ~= 'models' then
        if string.find(field, ':', 1, true) and not string.find(field, '^h:') then
          field = limited(tag .. 'total:' .. other, field)
        end
        aggregate(sum, field, value)
      end
    end
    if #sum.names > 0 then add(tag .. 'total:' .. other, sum) end
  end
end
local function part_gives_way(agent, part, other_agent, ms)
  local index = tag .. 'parts:' .. other_agent
  local other = string.sub(part, 1, 1) == '#' and part or '/' .. OTHER
  admit(index, other, MAX_PARTS)
  seen(index, other, ms)
  give_way(agent .. part, other_agent .. other)
end
for _, each in ipairs(leaving) do
  if each.index == AGENTS then
    admit(AGENTS, OTHER, MAX_AGENTS)
    seen(AGENTS, OTHER, each.ms)
    for _, part in ipairs(each.parts) do part_gives_way(each.member, part, OTHER, each.ms) end
    gone[#gone + 1] = tag .. 'parts:' .. each.member
    give_way(each.member, OTHER)
  else
    local owner = string.sub(each.index, #tag + 7)
    part_gives_way(owner, each.member, owner, each.ms)
  end
end

local sampled, outdated = 0, 0
local function sample(one, texts, from, to, slow)
  local fresh, slowest = one.fresh, one.slowest
  for age, text in string.gmatch(texts, '(%d+) (%S+)') do
    local ms = base - age
    if ms < from then ms = from elseif ms > to then ms = to end
    if ms <= now - RECENT_KEEP_MS then
      outdated = outdated + 1
    else
      sampled = sampled + 1
      local member = ms .. '|' .. text
      fresh[#fresh + 1] = member
      if slow then
        local size = #slowest
        slowest[size + 1] = tonumber(string.match(text, '^%d+'))
        slowest[size + 2] = member .. '|' .. SAMPLE_TAG .. '-' .. sampled
      end
    end
  end
end

local at, last, redirected = CELLS, #ARGV, 0
local late = {}  -- slices of this flush that may be closed already, by key
while at <= last do
  local one = series[tonumber(ARGV[at])]
  local oldest, newest, width = base - ARGV[at + 1], base - ARGV[at + 2], tonumber(ARGV[at + 3])
  local centre = (oldest + newest) / 2
  local from = floor(centre / width) * width
  local to = from + width - 1
  local first_ms, last_ms = math.max(oldest, from), math.min(newest, to)
  seen(AGENTS, one.agent, last_ms)
  if one.index then seen(one.index, one.part, last_ms) end
  local count = tonumber(ARGV[at + 4])
  at = at + 5
  local sum = {names = {}, values = {}}
  for f = at, at + 2 * count - 2, 2 do
    local field = ARGV[f]
    if string.find(field, ':', 1, true) and not string.find(field, '^h:') then field = limited(one.total, field) end
    aggregate(sum, field, tonumber(ARGV[f + 1]))
  end
  aggregate(sum, 'first_ms', first_ms)
  aggregate(sum, 'last_ms', last_ms)
  if one.moved then redirected = redirected + (sum.values.n or 0) end
  add(one.total, sum)
  local is_late = to + SETTLE_MS < base
  local shown = stamp(floor(centre / TIERS[1][WIDTH]) * TIERS[1][WIDTH], TIERS[1][SHOWN])
  for t = 1, 4 do
    local tier = TIERS[t]
    local start = floor(centre / tier[WIDTH]) * tier[WIDTH]
    local expires = start + tier[WIDTH] + KEEP[t]
    if tier[WIDTH] >= width and KEEP[t] > 0 and expires > now then
      local key = tag .. tier[NAME] .. ':' .. string.sub(shown, 1, tier[SHOWN]) .. ':' .. one.name  -- see `slice_key`
      add(key, sum, expires)
      if is_late and t >= MIN_CLOSED then late[key] = {tier = t, start = start, one = one} end
    end
  end
  at = at + 2 * count
  sample(one, ARGV[at], from, to, true)
  sample(one, ARGV[at + 1], from, to, false)
  at = at + 2
end

local writes, last_before = {}, {}  -- `last_before`: the stored time of the last sample, by key
for _, key in ipairs(order) do
  local names, values = sums[key].names, sums[key].values
  local stored = redis.pcall('HMGET', key, unpack(names))
  if stored.err then
    holds(key, 'hash')
    stored = {}
  end
  local write, is_stored = {}, false
  for i = 1, #names do
    local field = names[i]
    local value, text = values[field], stored[i]
    if text then
      local old = tonumber(text)  -- the same check as in `counter`, but without a function call in this loop
      if not (old and old >= 0 and old < 1e24) then wrong_key, wrong_type = key, 'a field that is no number'
      else
        local extreme = EXTREME[field]
        if not extreme then value = old + value
        elseif extreme == 'min' then if old < value then value = old end
        else
          if field == 'last_ms' then last_before[key] = old end
          if old > value then value = old end
        end
      end
      is_stored = true
    end
    -- redis.call writes all digits of a number, unlike tostring. But Redis 7.2 writes multiples of 10^8 in the form
    -- 1e+8, so these numbers are passed as text.
    if value >= 1e8 and value % 1e8 == 0 then value = whole(value) end
    write[2 * i - 1], write[2 * i] = field, value
  end
  if is_stored then expiries[key] = nil end  -- the flush that created the slice has set its expiry
  writes[key] = write
end
for i = 1, series_count do
  local one = series[i]
  if #one.fresh > 0 then
    holds(one.latest, 'list')
    one.slow_count = redis.pcall('ZCARD', one.slow)
    if type(one.slow_count) ~= 'number' then holds(one.slow, 'zset') end
  end
end
if wrong_key then return corrupt(wrong_key, wrong_type) end

-- Close slices; see includes/closed.lua. A flush closes two kinds of slices. Slices of the first kind get old enough to
-- close because this flush brings newer samples. In a series, only two slices of each width can be of this kind: the
-- slice that contains the last sample stored before this flush, and the slice before that slice. So the script needs no
-- search for them. Slices of the second kind are old already, and this flush adds late samples to them.
local MIN_FIELDS = 24  -- closing a slice with fewer fields saves too little memory for the time that it takes
local MAX_TAIL = 256  -- a slice stays a hash if more than this number of slices follow it
local to_close, closing  -- `to_close`: the slices to close, by list; `closing`: the writes that close them
local function is_closed(t, start, last_ms)
  return start + TIERS[t][WIDTH] + SETTLE_MS <= math.min(last_ms, now)
end
local function last_sample(one)  -- returns last_ms before this flush, and last_ms after this flush
  local before, own = last_before[one.total], sums[one.total].values.last_ms
  return before, before and before > own and before or own
end
local function close_later(t, start, name, key, last_ms)
  local size = redis.pcall('HLEN', key)
  if type(size) ~= 'number' or size + (writes[key] and #writes[key] / 2 or 0) < MIN_FIELDS then return end
  to_close = to_close or {}
  local list = tag .. t .. name
  local one = to_close[list]
  if not one then
    one = {tier = TIERS[t], name = name, keep = KEEP[t], keys = {}, starts = {}}
    one.newest = floor(last_ms / TIERS[t][WIDTH])
    to_close[list] = one
  end
  if not one.keys[start] then
    one.keys[start] = key
    one.starts[#one.starts + 1] = start
  end
end
for i = 1, series_count do
  local one, step = series[i], TIERS[MIN_CLOSED][WIDTH]
  local before, after = last_sample(one)
  if before and floor((before - SETTLE_MS) / step) < floor((after - SETTLE_MS) / step) then
    for t = MIN_CLOSED, 4 do
      local width = TIERS[t][WIDTH]
      local start = floor(before / width) * width
      for each = start - width, start, width do
        if is_closed(t, each, after) and not is_closed(t, each, before) and each + width + KEEP[t] > now then
          close_later(t, each, one.name, slice_key(tag, TIERS[t], each, one.name), after)
        end
      end
    end
  end
end
for key, slice in pairs(late) do
  local _, after = last_sample(slice.one)
  if is_closed(slice.tier, slice.start, after) then
    close_later(slice.tier, slice.start, slice.one.name, key, after)
  end
end

local function close_slices()
  local closed_key, stamp_of, _, add_line, _, _, encode_name = closed_functions()
  local HEAD = {'n', 'ok', 'err', 'cancelled', 'sum_us', 'min_us', 'max_us', 'last_ms'}
  local NOT_IN_LINE = {first_ms = true}  -- only the total of a series needs first_ms
  for _, name in ipairs(HEAD) do NOT_IN_LINE[name] = true end
  local function digits(value)
    local number = counter(value)
    if not number then error('a field that is no number', 0) end
    return number < 9e15 and whole(number) or format('%.17g', number)
  end
  local function line_of(start, tier, fields)  -- `fields` is a flat list, like the reply of HGETALL
    local head, rest, counts, least, most = {}, {}, {}, nil, nil
    for i = 1, #fields, 2 do
      local name, value = fields[i], fields[i + 1]
      local index = string.match(name, '^h:(%-?[1-9]?%d?%d)$')
      if index then
        local count = value + 0
        index = index + 0
        if not (count >= 0 and count < 9e15) or counts[index] then error('a field that is no number', 0) end
        counts[index] = value
        if not least or index < least then least = index end
        if not most or index > most then most = index end
      elseif NOT_IN_LINE[name] then
        head[name] = digits(value)
      else
        if string.find(name, '[%% =|]') then name = encode_name(name) end
        rest[#rest + 1] = ' ' .. name .. '=' .. digits(value)
      end
    end
    local line = stamp(start, tier[SHOWN])
    for _, name in ipairs(HEAD) do
      if head[name] then line = line .. ' ' .. name .. '=' .. head[name] end
    end
    line = line .. table.concat(rest)
    if not least then return line end
    local runs, size, previous = {}, 0, least - 5
    for index = least, most do
      local count = counts[index]
      if count then
        local distance = index - previous
        if distance > 3 then runs[size + 1] = ' ' .. index .. ':'  -- a new run is shorter than zeros for empty buckets
        elseif distance == 1 then runs[size + 1] = ','
        else runs[size + 1] = distance == 2 and ',0,' or ',0,0,' end
        runs[size + 2] = count
        size, previous = size + 2, index
      end
    end
    runs = table.concat(runs)
    if string.find(runs, '[^%d,: -]') then error('a field that is no number', 0) end
    return line .. ' |' .. runs
  end

  closing = {}
  -- Return two flat lists: the counters that the slice will have after this flush, and the counters that its hash has
  -- now. If the slice has no hash, the second result is false or nil. If this flush does not write to the slice either,
  -- the first result is false or nil too.
  local function counters_of(key, line)
    local stored, write = call('TYPE', key).ok == 'hash' and call('HGETALL', key), writes[key]
    if not (write or line) then return stored, stored end
    if not (write or stored) then return nil end
    local fields, flat = {}, {}
    for i = 1, stored and #stored or 0, 2 do fields[stored[i]] = stored[i + 1] + 0 end
    for i = 1, write and #write or 0, 2 do fields[write[i]] = write[i + 1] + 0 end
    if line then add_line(line, fields) end
    for name, value in pairs(fields) do flat[#flat + 1], flat[#flat + 2] = name, value end
    return flat, stored
  end
  local function close(one)
    local list = closed_key(tag, one.tier, one.name)
    local found = call('TYPE', list).ok
    if found ~= 'list' and found ~= 'none' then return end
    local tier, starts = one.tier, one.starts
    table.sort(starts)
    local first = 1
    while one.newest - starts[first] / tier[WIDTH] > MAX_TAIL do
      first = first + 1
      if first > #starts then return end
    end
    -- The lines of the first slice to close and of all later slices are among the last `wanted` lines of the list.
    local wanted = math.max(1, one.newest - starts[first] / tier[WIDTH])
    local lines = found == 'list' and call('LRANGE', list, -wanted, -1) or {}
    local stamps, position = {}, {}
    for l = 1, #lines do
      stamps[l] = stamp_of(lines[l], tier)
      position[stamps[l]] = l
    end
    if #lines == wanted and stamps[1] > stamp(starts[first], tier[SHOWN]) then return end
    local add_lines, moved, delete, kept = {}, {}, {}, #lines
    for s = first, #starts do
      local key, shown = one.keys[starts[s]], stamp(starts[s], tier[SHOWN])
      local fields, is_stored = counters_of(key, position[shown] and lines[position[shown]])
      if fields then
        add_lines[#add_lines + 1] = {shown = shown, line = line_of(starts[s], tier, fields)}
        if is_stored then delete[#delete + 1] = key end
        moved[#moved + 1] = key
        while kept > 0 and stamps[kept] >= shown do kept = kept - 1 end
      end
    end
    if #add_lines == 0 then return end
    -- The first `kept` lines stay. The later lines are removed. Then the removed lines and the new lines are pushed,
    -- the oldest slice first. If a slice has an old and a new line, only the new line is pushed.
    local push, next_line = {}, 1
    for l = kept + 1, #lines do
      while add_lines[next_line] and add_lines[next_line].shown < stamps[l] do
        push[#push + 1] = add_lines[next_line].line
        next_line = next_line + 1
      end
      if add_lines[next_line] and add_lines[next_line].shown == stamps[l] then
        push[#push + 1] = add_lines[next_line].line
        next_line = next_line + 1
      else
        push[#push + 1] = lines[l]
      end
    end
    for i = next_line, #add_lines do push[#push + 1] = add_lines[i].line end
    local outdated_to = stamp(floor((now - one.keep) / tier[WIDTH]) * tier[WIDTH] - tier[WIDTH], tier[SHOWN])
    local outdated_lines = 0
    local oldest = found == 'list' and call('LINDEX', list, 0)
    if oldest and stamp_of(oldest, tier) <= outdated_to then
      for _, line in ipairs(call('LRANGE', list, 0, 3)) do
        if stamp_of(line, tier) <= outdated_to then outdated_lines = outdated_lines + 1 end
      end
    end
    closing[#closing + 1] = {
      list = list, removed = #lines - kept, push = push, delete = delete, outdated = outdated_lines,
      expires = (kept == #lines and starts[#starts] + tier[WIDTH] or now) + one.keep,
    }
    for _, key in ipairs(moved) do writes[key] = nil end  -- the new lines have these counts, and no later step can fail
  end
  for _, one in pairs(to_close) do
    pcall(close, one)  -- an error means that another program has written a field or a line: the slices remain hashes
  end
end
if to_close then close_slices() end

-- The sequence number is written first. A server at maxmemory refuses this write and so ends the script before it has
-- written anything.
call('SET', WRITER, whole(SEQ), 'PX', WRITER_KEEP_MS)
for _, key in ipairs(order) do
  if writes[key] then
    call('HSET', key, unpack(writes[key]))
    if expiries[key] then call('PEXPIREAT', key, whole(expiries[key])) end
  end
end
for _, one in ipairs(closing or {}) do
  if one.removed > 0 then call('LTRIM', one.list, 0, -one.removed - 1) end
  call('RPUSH', one.list, unpack(one.push))
  if one.outdated > 0 then call('LTRIM', one.list, one.outdated, -1) end
  call('PEXPIREAT', one.list, whole(one.expires))
  if #one.delete > 0 then call('UNLINK', unpack(one.delete)) end
end
local is_kept = stored_keep and is_current and is_complete
for t = 1, 4 do is_kept = is_kept and stored_keep[t] == KEEP[t] end
if not is_kept then
  call('HSET', SETTINGS, 'schema', SCHEMA)
  for t = 1, 4 do call('HSET', SETTINGS, TIERS[t][NAME], whole(KEEP[t]) .. 'ms') end
end
for index, known in pairs(indexes) do
  for member, ms in pairs(known.seen) do call('ZADD', index, 'GT', whole(ms), member) end
end
for _, fields in ipairs(gone_fields) do call('HDEL', unpack(fields)) end
for _, each in ipairs(leaving) do call('ZREM', each.index, each.member) end
for first = 1, #gone, 4000 do call('UNLINK', unpack(gone, first, math.min(first + 3999, #gone))) end
local function zadd(key, flat)
  for first = 1, #flat, 4000 do call('ZADD', key, unpack(flat, first, math.min(first + 3999, #flat))) end
end
for i = 1, series_count do
  local one = series[i]
  if #one.fresh > 0 then
    local size, excess = 0, 0
    for first = 1, #one.fresh, 4000 do
      size = call('RPUSH', one.latest, unpack(one.fresh, first, math.min(first + 3999, #one.fresh)))
    end
    local outdated_to = whole(now - RECENT_KEEP_MS)  -- the 13 digits of a sample's time can be compared as text
    if string.sub(call('LINDEX', one.latest, 0), 1, 13) <= outdated_to then
      for _, member in ipairs(call('LRANGE', one.latest, 0, math.min(#one.fresh, 64))) do
        if string.sub(member, 1, 13) > outdated_to then break end
        excess = excess + 1
      end
    end
    excess = math.max(excess, size - MAX_RECENT)
    if excess > 0 then call('LTRIM', one.latest, excess, -1) end
    call('PEXPIRE', one.latest, RECENT_KEEP_MS)
    -- Only samples slower than `min_us` are added. While the set has room, `min_us` is -1. If the set is full, `min_us`
    -- is the duration of its fastest sample.
    local min_us = -1
    if one.slow_count >= MAX_SLOW then min_us = tonumber(call('ZRANGE', one.slow, 0, 0, 'WITHSCORES')[2]) end
    local slower = {}
    for s = 1, #one.slowest, 2 do
      if one.slowest[s] > min_us then
        slower[#slower + 1], slower[#slower + 2] = one.slowest[s], one.slowest[s + 1]
      end
    end
    if #slower > 0 then
      zadd(one.slow, slower)
      call('ZREMRANGEBYRANK', one.slow, 0, -MAX_SLOW - 1)
      for _, member in ipairs(call('ZRANGE', one.slow, 0, -1)) do
        if tonumber(string.match(member, '^%d+') or 0) <= now - SLOW_KEEP_MS then call('ZREM', one.slow, member) end
      end
      call('PEXPIRE', one.slow, SLOW_KEEP_MS)
    end
  end
end
return {1, now, redirected, outdated}
