-- Rarely used functions: for whole records, expiries, and grants to waiters. Needs strategies.lua, records.lua,
-- field.lua, whole_records.lua, pool.lua, labels.lua and health.lua.

-- Whether a number has a leading zero. HINCRBY raises an error if a field has such a number. Scripts check the number
-- before their first write, because a script must not fail after its first write.
local function has_leading_zero(text) return text and text ~= '0' and match(text, '^%-?0') end

-- Decode the text of #load or #cap. Scripts change these sums mostly by HINCRBY, which treats a missing field as 0. So
-- after another program has deleted the field of a sum, the sum may be negative.
local function whole_sum(text)
  if has_leading_zero(text) then return nil end
  return whole_number(text, 0) or (string.sub(text, 1, 1) == '-' and whole_number(string.sub(text, 2)) and text + 0)
end

-- Return the milliseconds until the first timer in `due` that may free capacity, such as the expiry of a lease or
-- grant. The result is at most 1000. The timers of tombstones, waiters and heartbeats free no capacity and are skipped.
-- A busy queue leaves many tombstones, so only the first AHEAD timers are read. If all AHEAD timers are skipped, the
-- result is the time until the last of them. If `due` has fewer timers and all are skipped, the result is 1000.
local function retry_after_ms(now_ms)
  local AHEAD = 32
  local some = call('ZRANGE', DUE, 0, AHEAD - 1, 'WITHSCORES')
  for i = 1, #some, 2 do
    if not match(some[i], '^[XWH]') or i > 2 * AHEAD - 2 then
      return math.max(0, math.min(1000, some[i + 1] - now_ms))
    end
  end
  return 1000
end

-- Return the bound of a timer in `due`: the longest time, ms, that the timer can have left. Returns nil if this
-- function knows no bound. Tombstones and heartbeats have no bound, since callers choose the times of these timers. For
-- rate limits, rests and warm-ups, no bound is needed: `correct_times` in health.lua corrects their timers.
local function longest_ms(name)
  local MAX_TTL_MS, CLAIM_MS, LIVE_MS = 86400000, 3000, 3000  -- as in model.py, `maintenance` and queue.py, in order
  local EJECTION_MS = 300000                                  -- as in settings.py
  local kind = string.sub(name, 1, 1)
  if kind == '@' then
    local record = call('HGET', STATE, name) or ''
    if match(record, LEASE) then return whole_number(match(record, LEASE_TTL)) or MAX_TTL_MS end
    return match(record, GRANTED) and CLAIM_MS
  elseif kind == 'E' then
    return whole_number(match(call('HGET', STATE, '#settings') or '', 'max_ejection_ms=(%d+)')) or EJECTION_MS
  elseif kind == 'W' then
    return LIVE_MS
  end
  return kind == 'P' and 0 or nil
end

-- Decode the text of #clock. Returns three values, or nil if the library did not write the text:
--   is_set_back  whether timers must be corrected: the server's clock was set back after the text was written, or the
--                text has the cursor of an unfinished correction
--   is_old       whether the time in the text must be replaced: it is more than OLD_MS in the past, or more than
--                STEP_MS in the future
--   cursor       the ZSCAN cursor at which the correction of `due` continues; '0': at the start
local function read_clock(text, now_ms)
  local STEP_MS, OLD_MS = 1000, 30000
  local clock_ms, cursor = match(text or '0', '^(%d+) ?(%d*)$')
  clock_ms = whole_number(clock_ms)
  if not clock_ms or #cursor > 18 then return nil end
  if now_ms < clock_ms - STEP_MS then return true, true, '0' end
  return cursor ~= '', now_ms > clock_ms + OLD_MS, cursor == '' and '0' or cursor
end

-- Whether a timer at the end of `due` has more time left than its bound (see `longest_ms`). Such a timer shows that the
-- server's clock was set back, even if #clock is too old to show it. Of the 8 latest timers, only one is checked: the
-- latest timer whose kind has a bound. Timers that are due within DISTANT_MS (two minutes) are not checked. Most timers
-- are due that soon, so usually no record is read. At most one record is read.
local function has_distant_timer(now_ms)
  local DISTANT_MS, STEP_MS, LAST = 120000, 1000, 8
  local last = call('ZRANGE', DUE, -LAST, -1, 'WITHSCORES')
  for i = #last - 1, 1, -2 do
    local at_ms = tonumber(last[i + 1])
    if at_ms <= now_ms + DISTANT_MS then return false end
    if match(last[i], '^[@EWP]') then
      local max_ms = longest_ms(last[i])
      return max_ms and at_ms > now_ms + max_ms + STEP_MS
    end
  end
  return false
end

-- Return the pool as an object with the functions below and the functions of health.lua. A script calls `maintenance`
-- only if it needs the object, since creating the object costs some microseconds. The first call must come before the
-- first write of the script, because `maintenance` raises an error for keys of a wrong type.
--   invalid  the name of a field of `state` whose value the library did not write; nil if there is none. If there is
--            one, a script must return `corrupt(pool.invalid)` before it writes. Otherwise arithmetic on the value
--            could raise an error after the first write
--   changed  whether the functions of this object have written anything
local function maintenance(now_us)
  local CLAIM_MS, TOMBSTONE_MS, NEVER = 3000, 120000, 4503599627370496
  local GRANTS, FEW, MANY, LOOKS, TIMERS = 16, 4, 32, 5, 250
  -- The fields of the extra record in the order in which they are written, each followed by its format.
  local EXTRA = {
    'ejections', '%d', 'ejected_until_ms', '%.0f', 'probe_since_us', '%.0f', 'leases_before', '%d',
    'adaptive_limit_milli', '%.15g', 'limit_cut_us', '%.0f', 'warm_tenths', '%d', 'checks', '%d', 'checked_ms', '%.0f',
    'rpm', '%s', 'tpm', '%s', 'rpm_arrival_us', '%.0f', 'tpm_arrival_us', '%.0f', 'metered_us', '%.0f',
    'heartbeat_ms', '%.0f', 'rest_until_ms', '%.0f', 'rest_set_ms', '%.0f',
  }
  if not now_us then
    local clock = call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
  end
  local now_ms = floor(now_us / 1000)
  local function number(text) return whole_number(text) or 0 end
  local known = call('HMGET', STATE, '#pool', '#settings', '#panic', '#usable', '#unhealthy', '#warming', '#calm',
    '#next', '#picks', '#load', '#cap', '#clock', '#watched')
  local _, strategy, score, _, waiter = opened(known[1])
  if not score then score, _, waiter = rules(POOL .. DEFAULT_STRATEGY) end
  local invalid = not whole_number(known[8], 0) and '#next'
    or (not whole_number(known[9], 0) or has_leading_zero(known[9])) and '#picks'
    or not whole_sum(known[10]) and '#load' or not whole_sum(known[11]) and '#cap'
    or read_clock(known[12], now_ms) == nil and '#clock' or not whole_number(known[13], 0) and '#watched' or nil
  local self = {now_us = now_us, now_ms = now_ms, strategy = strategy, invalid = invalid, changed = false}
  call('ZCARD', READY)
  call('ZCARD', DUE)
  call('ZCARD', WAITQ)
  health(self, {
    settings = known[2], panic = known[3] and true or false, usable = number(known[4]), unhealthy = number(known[5]),
    warming = number(known[6]), calm_ms = number(known[7]),
  })

  -- Return an extra record in which every field is 0. Rate limits are text, the other fields are numbers.
  function self.no_extra()
    local extra = {later = ''}
    for i = 1, #EXTRA, 2 do extra[EXTRA[i]] = EXTRA[i + 1] == '%s' and '0' or 0 end
    return extra
  end

  -- Decode the text of an extra record. Returns nil if the library did not write the text.
  local function read_extra(text)
    local extra = self.no_extra()
    for word in string.gmatch(text, '%S+') do
      local name, value = match(word, '^([%a_]+)=(%-?%d+%.?%d*)$')
      local before = name and extra[name]
      if before and name ~= 'later' then
        local number = #value <= 17 and value + 0
        if not number or number >= 9e15 or (number < 0 and (name ~= 'checks' or number <= -9e15)) then return nil end
        if before == '0' and number == 0 and value ~= '0' then return nil end
        extra[name] = before == '0' and value or number
      else
        -- A field of a later version may have any value and is kept. Any other word shows that the library did not
        -- write the text, unless the whole text is '-'.
        name = match(word, '^([%a_]+)=%S+$')
        if name and name ~= 'later' and extra[name] == nil then
          extra.later = extra.later .. ' ' .. word
        elseif name or text ~= '-' then
          return nil
        end
      end
    end
    return extra
  end

  -- Whether the library wrote the record of an instance and its extra record, if there is one.
  function self.is_valid(record, extra) return read_record(record) and (not extra or read_extra(extra)) and true end

  local function write_extra(extra)
    local words = {}
    for i = 1, #EXTRA, 2 do
      local value = extra[EXTRA[i]]
      if value ~= 0 and value ~= '0' then words[#words + 1] = EXTRA[i] .. '=' .. format(EXTRA[i + 1], value) end
    end
    local text = table.concat(words, ' ') .. extra.later
    return text == '' and '-' or match(text, '^ ?(.*)$')
  end

  -- Return the size of a sorted set, nil for a key of another type. An error is caught, because a script must not fail
  -- after its first write.
  local function size_of(key)
    local size = redis.pcall('ZCARD', key)
    return type(size) == 'number' and size or nil
  end

  -- Return the record of an instance. Return nil and false if there is no record. Return nil and true if the record or
  -- its extra record cannot be read, or if the index of one of the instance's labels has a wrong type.
  function self.read(id)
    local found = call('HMGET', STATE, id, '+' .. id)
    if not found[1] then return nil, false end
    local load, limit, seq, fence, peak, ewma_us, ewma_at_ms, served, failed, streak, weight, labels, flags, cap,
      later = read_record(found[1])
    local extra = found[2] and read_extra(found[2]) or nil
    if not load or (found[2] and not extra) then return nil, true end
    for label in string.gmatch(labels == '-' and '' or labels, '[^,]+') do
      if not size_of(READY .. '@' .. label) then return nil, true end
    end
    return {
      id = id, load = tonumber(load), limit = tonumber(limit), seq = seq, fence = tonumber(fence),
      peak = tonumber(peak), ewma_us = tonumber(ewma_us), ewma_at_ms = tonumber(ewma_at_ms), served = tonumber(served),
      failed = tonumber(failed), streak = tonumber(streak), weight = weight, labels = labels,
      flags = self.flags_of(flags), cap = tonumber(cap), later = later, extra = extra,
      old_flags = flags, old_load = tonumber(load), old_cap = tonumber(limit) > 0 and tonumber(cap) or 0,
    }
  end

  -- Return a new record, not stored yet.
  function self.new(id)
    return {
      id = id, load = 0, limit = 0, seq = '0', fence = 0, peak = 0, weight = '1', labels = '-', flags = {}, cap = 0,
      ewma_us = 0, ewma_at_ms = 0, served = 0, failed = 0, streak = 0, later = '',
      old_flags = 'removed', old_load = 0, old_cap = 0,
    }
  end

  -- Return the first instance of `ids` whose record the library did not write; nil if there is none. Raises an error if
  -- the index of a label of one of the instances has a wrong type. Scripts call this function before their first write.
  function self.first_corrupt(ids)
    for _, id in ipairs(ids) do
      local _, is_corrupt = self.read(id)
      if is_corrupt then
        check_types(field(call('HGET', STATE, id), 'labels') or '-')
        return id
      end
    end
  end

  -- Change the labels of an instance. Removes the instance from the indexes of its old labels; `store` adds the
  -- instance to the indexes of the new labels.
  function self.relabel(r, labels)
    if r.labels ~= '-' and r.labels ~= labels then
      for label in string.gmatch(r.labels, '[^,]+') do call('ZREM', READY .. '@' .. label, r.id) end
    end
    r.labels = labels
  end

  -- Write a record, or delete it if the instance is removed and has no leases. Computes the limit from the other
  -- fields, and updates the pool's sums, counts and indexes. Returns the text of the record, nil if it was deleted.
  function self.store(r)
    local panic_changed, text = self.count(r), nil
    self.changed = true
    r.limit = self.limit(r)
    if r.load ~= r.old_load then call('HINCRBY', STATE, '#load', format('%d', r.load - r.old_load)) end
    local cap = r.limit > 0 and r.cap or 0
    if cap ~= r.old_cap then call('HINCRBY', STATE, '#cap', format('%d', cap - r.old_cap)) end
    r.old_load, r.old_cap = r.load, cap
    if r.flags.removed and r.load == 0 then
      call('HDEL', STATE, r.id, '+' .. r.id)
    else
      text = write_record(r, r.old_flags)
      call('HSET', STATE, r.id, text)
      if r.extra then call('HSET', STATE, '+' .. r.id, write_extra(r.extra)) end
    end
    index(score, r.id, r.load, r.limit, r.seq, r.weight, r.labels, nil)
    if panic_changed then self.store_away('0') end
    return text
  end

  -- Write a tombstone for a token. ZREM comes first, because the server allows it even at maxmemory. ZREM counts as a
  -- write even if it removes nothing. After the first write of a script, the server no longer checks the memory.
  function self.tombstone(token, why, keep_ms)
    self.changed = true
    call('ZREM', DUE, token)
    call('HSET', STATE, token, write_tombstone(why))
    call('ZADD', DUE, format('%.0f', now_ms + (keep_ms or TOMBSTONE_MS)), 'X' .. token)
  end

  function self.free(id, fence)
    local r = self.read(id)
    if r and r.load > 0 then
      self.end_lease(r, fence)
      self.store(r)
    end
  end

  -- Return the next fencing token of an instance: the present time or the last token + 1, whichever is higher. So the
  -- token is higher than all earlier tokens of the instance. There is one exception: the last token is no longer
  -- stored, for example after a loss of data, and the server's clock was set back.
  function self.next_fence(fence) return fence < now_us and now_us or fence + 1 end

  -- Grant a lease on an instance to the request with this token. `write` is write_lease or write_granted; it makes the
  -- record of the token. `last` is the third argument of `write`. Returns the fencing token and the text of the
  -- instance's record.
  function self.grant(r, token, due_ms, write, last, tokens)
    r.load, r.fence = r.load + 1, self.next_fence(r.fence)
    r.peak = math.max(r.peak, r.load)
    r.seq = format('%.0f', call('HINCRBY', STATE, '#picks', 1))
    if r.flags.metered then self.count_request(r, tokens) end
    call('ZADD', DUE, format('%.0f', due_ms), token)
    call('HSET', STATE, token, write(r.id, format('%d', r.fence), last, format('%.0f', due_ms - now_ms)))
    return r.fence, self.store(r)
  end

  -- Correct a timer that is too far in the future because the server's clock was set back after the timer was set. The
  -- timer gets the latest time that it could have if it were set now. Timers of tombstones and heartbeats stay as they
  -- are.
  function self.correct_timer(name, at_ms)
    local kind, max_ms = string.sub(name, 1, 1), longest_ms(name)
    if kind == 'E' or kind == 'R' or kind == 'V' or kind == 'C' then
      local r = self.read(string.sub(name, 3))
      if r and self.correct_times(r) then self.store(r) end
    end
    if max_ms and at_ms > now_ms + max_ms then
      self.changed = true
      call('ZADD', DUE, format('%.0f', now_ms + max_ms), name)
    end
  end

  -- If the server's clock was set back, correct about TIMERS timers. Later calls correct the others. Until all timers
  -- are correct, #clock also holds a ZSCAN cursor, at which the next call continues in `due`.
  local function correct_timers()
    local is_set_back, _, cursor = read_clock(known[12], now_ms)
    if not is_set_back and not has_distant_timer(now_ms) then return end
    call('ZREM', DUE, '')  -- removes nothing; after a write, the server runs the rest of the script even at maxmemory
    local scan = call('ZSCAN', DUE, cursor, 'COUNT', TIMERS)
    for i = 1, #scan[2], 2 do self.correct_timer(scan[2][i], tonumber(scan[2][i + 1])) end
    self.changed = true
    known[12] = format('%.0f', now_ms) .. (scan[1] == '0' and '' or ' ' .. scan[1])
    call('HSET', STATE, '#clock', known[12])
  end

  -- Process at most `limit` due timers. Returns the number processed.
  function self.expire(limit)
    correct_timers()
    local names = call('ZRANGEBYSCORE', DUE, '-inf', format('%.0f', now_ms), 'LIMIT', 0, limit)
    for _, name in ipairs(names) do
      local kind, rest = string.sub(name, 1, 1), string.sub(name, 2)
      self.changed = true
      call('ZREM', DUE, name)
      if kind == '@' then
        local record = call('HGET', STATE, name) or ''
        local id, fence = match(record, LEASE)
        local fetched = id and '1' or '0'
        if not id then id, fence = match(record, GRANTED) end
        if id then
          self.free(id, tonumber(fence))
          self.tombstone(name, fetched == '1' and 'expired' or 'unfetched')
          self.add_event('expired', id, 'lease', name, 'fetched', fetched)
        end
      elseif kind == 'W' then
        call('ZREM', WAITQ, rest)
        call('HDEL', STATE, rest)
      elseif kind == 'X' then
        if match(call('HGET', STATE, rest) or '', TOMBSTONE) then call('HDEL', STATE, rest) end
      elseif kind == 'P' then
        local cursor = match(rest, '^:(%d+)$')
        if cursor and #cursor <= 20 then self.store_away(cursor) end
      else
        self.timer(kind, string.sub(rest, 2))
      end
    end
    return #names
  end

  -- Return the id of a ready instance for a waiter that requires these labels ('-': no labels). Returns nil if no ready
  -- instance has them. If several ready instances have them, the strategy decides whether the first, the last or any
  -- of these instances is returned; see `waiter` in strategies.lua. With several labels, only the smallest of their
  -- indexes is searched.
  local offset = now_us
  function self.best(labels)
    local from, smallest, several = READY, nil, string.find(labels, ',', 1, true)
    if labels ~= '-' then
      for label in string.gmatch(labels, '[^,]+') do
        local size = size_of(READY .. '@' .. label)
        if not size then return nil end
        if not smallest or size < smallest then from, smallest = READY .. '@' .. label, size end
      end
    end
    local order, first = waiter == 'last' and 'ZREVRANGE' or 'ZRANGE', 0
    if waiter == 'any' then
      offset = offset + 1
      first = offset % math.max(1, smallest or call('ZCARD', from))
    end
    if not several then return call(order, from, first, first)[1] end
    local function among(low, high)
      for at = low, high, 32 do
        local some = call(order, from, at, math.min(high, at + 31))
        for i, record in ipairs(#some > 0 and call('HMGET', STATE, unpack(some)) or {}) do
          if has_all(field(record or '', 'labels') or '', labels) then return some[i] end
        end
      end
    end
    return among(first, smallest - 1) or among(0, first - 1)
  end

  -- Record that waiters of other shards watch this shard until `until_ms`. The next script that finds a free instance
  -- wakes them.
  function self.watch(until_ms)
    self.changed, known[13] = true, format('%.0f', math.max(until_ms, tonumber(known[13] or 0)))
    call('HSET', STATE, '#watched', known[13])
  end

  -- Grant free units to waiters in queue order. A waiter that has stopped polling is skipped. A waiter is also skipped
  -- if no ready instance has its labels. So this waiter does not block the waiters behind it. The same labels are not
  -- searched again in this call, since no unit becomes free during the call. A call examines at most some 130 waiters:
  -- FEW + (LOOKS - 1) * MANY. A waiter has CLAIM_MS to fetch its grant. The published message only tells the waiter to
  -- fetch the grant. Returns false if the search stopped after GRANTS grants: more grants may be possible.
  local function grant_to_waiters()
    if call('ZCARD', WAITQ) == 0 then return true end
    local at, granted, vain = 0, 0, {}
    for look = 1, LOOKS do
      if call('ZCARD', READY) == 0 then return true end
      local tokens = call('ZRANGE', WAITQ, at, at + (look == 1 and FEW or MANY) - 1)
      if #tokens == 0 then return true end
      local marks = {}
      for i, token in ipairs(tokens) do marks[i] = 'W' .. token end
      local live_until = call('ZMSCORE', DUE, unpack(marks))
      for i, record in ipairs(call('HMGET', STATE, unpack(tokens))) do
        local token, ticket, labels, need = tokens[i], match(record or '', WAITING)
        if live_until[i] and tonumber(live_until[i]) <= now_ms then labels = nil end
        if labels and not whole_number(need) then labels = nil end
        local id = labels and not vain[labels] and self.best(labels)
        local r = id and self.read(id)
        if r and r.load < r.limit then
          call('ZREM', WAITQ, token)
          call('ZREM', DUE, 'W' .. token)
          self.grant(r, token, now_ms + CLAIM_MS, write_granted, ticket, tonumber(need))
          call('SPUBLISH', WAITQ, token)
          granted = granted + 1
          if granted == GRANTS then return false end
        else
          at = at + 1
          if labels then vain[labels] = true end
          if labels == '-' and not id then return true end
        end
      end
    end
    return true
  end

  -- Grant free units to waiters. If an instance is still free after that, wake those waiters of other shards that watch
  -- this shard (see #watched in pool.lua). The wake-up ends the watch. A waiter that still gets no lease watches the
  -- shard again. Returns false if more grants may be possible.
  function self.dispatch()
    if not grant_to_waiters() then return false end
    if known[13] and call('ZCARD', READY) > 0 then
      self.changed, known[13] = true, false
      call('HDEL', STATE, '#watched')
      call('SPUBLISH', WAITQ, 'free')
    end
    return true
  end

  -- If the pool has no instance, give its keys a TTL; if it has an instance, remove the TTL. The TTL is:
  -- - a minute in the usual case. During this minute, other processes still find the pool's creation time. So they see
  --   that the instances were removed, and that the server did not lose them.
  -- - a day if `configure` has set the settings, since the instances may come later.
  -- - a week while a removed instance still has a lease, since a renewal of the lease does not start the TTL again.
  -- While the queue has waiters, each of their polls starts the TTL again.
  function self.update_expiry()
    local EMPTY_MS, CONFIGURED_MS, LEASED_MS, HISTORY_MS = 60000, 86400000, 604800000, '691200000'
    local TAG = string.sub(READY, 1, -6)
    local facts = call('HMGET', STATE, '#expires', '#configured', '#load')
    local keep_ms
    if size_of(TAG .. 'ids') == 0 then
      keep_ms = (whole_sum(facts[3] or '0') or 0) > 0 and LEASED_MS or facts[2] and CONFIGURED_MS or EMPTY_MS
    end
    local text = keep_ms and format('%d', keep_ms) or false
    -- The TTL of `due` is checked too, because `due` may have lost it: the key is deleted with its last timer, and a
    -- later tombstone creates the key without a TTL.
    if text == facts[1] and (not text or (call('ZCARD', WAITQ) == 0 and call('PTTL', DUE) ~= -1)) then return end
    self.changed = true
    local keys = {STATE, DUE, WAITQ, TAG .. 'events'}
    if text then
      call('HSET', STATE, '#expires', text)
      local last_ms = tonumber(call('ZRANGE', DUE, -1, -1, 'WITHSCORES')[2] or 0)  -- a tombstone may need a longer TTL
      keep_ms = format('%d', math.max(keep_ms, math.min(last_ms - now_ms, LEASED_MS)))
      for _, key in ipairs(keys) do call('PEXPIRE', key, keep_ms) end
      call('PEXPIRE', TAG .. 'history', keep_ms)
    else
      call('HDEL', STATE, '#expires')
      for _, key in ipairs(keys) do call('PERSIST', key) end
      call('PEXPIRE', TAG .. 'history', HISTORY_MS)
    end
  end

  -- Store the time of the next maintenance in #next. If the time in #clock is old, replace it with the present time.
  -- But if #clock shows that the server's clock was set back, leave #clock unchanged: `expire` needs it to correct the
  -- timers.
  function self.reschedule()
    local next_ms = '0'
    if known[13] and tonumber(known[13]) <= now_ms then
      call('HDEL', STATE, '#watched')
      known[13] = false
    end
    if call('ZCARD', WAITQ) == 0 and not known[13] then
      local first_ms = tonumber(call('ZRANGE', DUE, 0, 0, 'WITHSCORES')[2] or NEVER)
      next_ms = format('%.0f', math.max(0, math.min(NEVER, first_ms)))
    end
    self.changed = self.changed or next_ms ~= known[8]
    call('HSET', STATE, '#next', next_ms)
    if self.usable == 0 then self.update_expiry() end  -- a pool with a usable instance has no TTL; see `register`
    local is_set_back, is_old = read_clock(known[12], now_ms)
    if is_old and not is_set_back then
      self.changed = true
      call('HSET', STATE, '#clock', format('%.0f', now_ms))
    end
  end

  -- Process due timers, then grant free units to waiters. Returns the number of timers processed, and false as the
  -- second result if more grants may be possible.
  function self.maintain(limit)
    local expired = self.expire(limit)
    local dispatched = self.dispatch()
    self.reschedule()
    return expired, dispatched
  end

  return self
end
