-- What is needed seldom: whole records, expiries, handing over. Expects what pool.lua expects, and health.lua before it.

-- Until capacity may come back by itself, ms, at most 1000: when the first lease or grant ends. Tombstones, silent waiters and
-- heartbeats bring none, and a busy line leaves many tombstones: at most AHEAD of these are looked past.
local function respite(now_ms)
  local AHEAD = 32
  local some = call('ZRANGE', DUE, 0, AHEAD - 1, 'WITHSCORES')
  for i = 1, #some, 2 do
    if not match(some[i], '^[XWH]') or i > 2 * AHEAD - 2 then
      return math.max(0, math.min(1000, some[i + 1] - now_ms))
    end
  end
  return 1000
end

-- Built only when asked for, since building these functions costs some microseconds. Rejects poisoned keys before the first
-- write.
local function upkeep(now_us)
  local CLAIM_MS, TOMBSTONE_MS, NEVER = 3000, 120000, '4503599627370496'
  local GRANTS, FEW, MANY, LOOKS = 16, 4, 32, 5
  if not now_us then
    local clock = call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
  end
  local now_ms = floor(now_us / 1000)
  local function number(text) return whole(text) and tonumber(text or 0) or 0 end
  local known = call('HMGET', STATE, '#pool', '#settings', '#panic', '#usable', '#out', '#warming', '#calm')
  local strategy = match(known[1] or '', POOL)
  local self = {now_us = now_us, now_ms = now_ms, strategy = strategy}
  call('ZCARD', READY)
  call('ZCARD', DUE)
  call('ZCARD', WAITQ)
  health(self, {
    settings = known[2], panic = known[3] and true or false,
    usable = number(known[4]), out = number(known[5]), warming = number(known[6]), calm_ms = number(known[7]),
  })

  -- The record of an instance; nil when there is none, or none that we wrote.
  function self.read(id)
    local found = call('HMGET', STATE, id, '+' .. id)
    local load, lim, seq, fence, peak, weight, labels, rest = match(found[1] or '', RECORD)
    local flags, cap, ewma_us, ewma_ms, served, failed, fails = match(rest or '', REST)
    if not fails then return nil end
    local more
    if found[2] then
      local ejects, until_ms, since_us, old, limit, cut_us, rest_of_it = match(found[2], MORE)
      local warm, checks, checked_ms, rpm, tpm, rpm_us, tpm_us, beat_ms = match(rest_of_it or '', MORE_REST)
      if not tpm_us then return nil end
      more = {
        ejects = tonumber(ejects), until_ms = tonumber(until_ms), since_us = tonumber(since_us), old = tonumber(old),
        limit = tonumber(limit), cut_us = tonumber(cut_us), warm = tonumber(warm), checks = tonumber(checks),
        checked_ms = tonumber(checked_ms), rpm = rpm, tpm = tpm, rpm_us = tonumber(rpm_us), tpm_us = tonumber(tpm_us),
        beat_ms = tonumber(beat_ms) or 0,
      }
    end
    check(labels)
    return {
      id = id, load = tonumber(load), lim = tonumber(lim), seq = seq, fence = tonumber(fence), peak = tonumber(peak),
      weight = weight, labels = labels, flags = flags, cap = tonumber(cap), ewma_us = tonumber(ewma_us),
      ewma_ms = tonumber(ewma_ms), served = tonumber(served), failed = tonumber(failed), fails = tonumber(fails),
      more = more, old_flags = flags, old_load = tonumber(load), old_cap = tonumber(lim) > 0 and tonumber(cap) or 0,
    }
  end

  -- Give other labels. Takes it out of all label indexes; `store` puts it into those it has.
  function self.relabel(r, labels)
    if r.labels ~= '-' and r.labels ~= labels then
      for label in string.gmatch(r.labels, '[^,]+') do call('ZREM', READY .. '@' .. label, r.id) end
    end
    r.labels = labels
  end

  -- Write a record back: lim follows from the rest, a removed and empty one goes, sums, counts and indexes follow.
  -- Returns its text.
  function self.store(r)
    local turned, text = self.count(r), nil
    r.lim = self.limit(r)
    if r.load ~= r.old_load then call('HINCRBY', STATE, '#load', format('%d', r.load - r.old_load)) end
    local cap = r.lim > 0 and r.cap or 0
    if cap ~= r.old_cap then call('HINCRBY', STATE, '#cap', format('%d', cap - r.old_cap)) end
    r.old_load, r.old_cap = r.load, cap
    if self.has(r, 'r') and r.load == 0 then
      call('HDEL', STATE, r.id, '+' .. r.id)
    else
      text = format('%d %d %s %.0f %d %s %s %s %d %.0f %.0f %.0f %.0f %.0f', r.load, r.lim, r.seq, r.fence,
        r.peak, r.weight, r.labels, r.flags, r.cap, r.ewma_us, r.ewma_ms, r.served, r.failed, r.fails)
      call('HSET', STATE, r.id, text)
      local more = r.more
      if more then
        call('HSET', STATE, '+' .. r.id, format('%d %.0f %.0f %d %.15g %.0f %d %d %.0f %s %s %.0f %.0f%s', more.ejects,
          more.until_ms, more.since_us, more.old, more.limit, more.cut_us, more.warm, more.checks, more.checked_ms, more.rpm, more.tpm,
          more.rpm_us, more.tpm_us, more.beat_ms > 0 and ' ' .. format('%.0f', more.beat_ms) or ''))
      end
    end
    index(strategy, r.id, r.load, r.lim, r.seq, r.weight, r.labels, nil)
    if turned then self.resettle('0') end
    return text
  end

  -- Remember that a token is spent. The ZREM removes nothing: it is a first write that is allowed at maxmemory, and
  -- after a first write memory is not asked for again.
  function self.bury(token, why, keep_ms)
    call('ZREM', DUE, token)
    call('HSET', STATE, token, 'X ' .. why)
    call('ZADD', DUE, format('%.0f', now_ms + (keep_ms or TOMBSTONE_MS)), 'X' .. token)
  end

  function self.give_back(id, fence)
    local r = self.read(id)
    if r and r.load > 0 then
      self.unload(r, fence)
      self.store(r)
    end
  end

  -- Fencing numbers rise per instance, over a restart that lost them too, as long as the clock does.
  function self.next_fence(fence) return fence < now_us and now_us or fence + 1 end

  -- Lease one unit of an instance to a token, as kind says: L or G. Returns the fence and the instance's record.
  function self.grant(r, token, due_ms, kind, tail, tokens)
    r.load, r.fence = r.load + 1, self.next_fence(r.fence)
    r.peak = math.max(r.peak, r.load)
    r.seq = format('%.0f', call('HINCRBY', STATE, '#picks', 1))
    if self.has(r, 'l') then self.meter(r, tokens) end
    call('ZADD', DUE, format('%.0f', due_ms), token)
    call('HSET', STATE, token, format('%s %s %.0f %s', kind, r.id, r.fence, tail))
    return r.fence, self.store(r)
  end

  -- Deal with at most limit things that are due; returns how many there were.
  function self.reap(limit)
    local names = call('ZRANGEBYSCORE', DUE, '-inf', format('%.0f', now_ms), 'LIMIT', 0, limit)
    for _, name in ipairs(names) do
      local kind, rest = string.sub(name, 1, 1), string.sub(name, 2)
      call('ZREM', DUE, name)
      if kind == '@' then
        local what, id, fence = match(call('HGET', STATE, name) or '', '^([LG]) (%S+) (%d+)')
        if what then
          self.give_back(id, tonumber(fence))
          self.bury(name, what == 'L' and 'e' or 'u')
          self.tell('expired', id, 'lease', name, 'fetched', what == 'L' and '1' or '0')
        end
      elseif kind == 'W' then
        call('ZREM', WAITQ, rest)
        call('HDEL', STATE, rest)
      elseif kind == 'X' then
        if string.sub(call('HGET', STATE, rest) or '', 1, 1) == 'X' then call('HDEL', STATE, rest) end
      elseif kind == 'P' then
        self.resettle(string.sub(rest, 2))
      else
        self.timer(kind, string.sub(rest, 2))
      end
    end
    return #names
  end

  -- The best ready instance with all of these labels ('-' for none): the first in the order of its index, the last
  -- under weighted, any under random and peak_ewma, whose index has no order. With several labels, look through the
  -- smallest of their indexes.
  local turn = now_us
  function self.best(labels)
    local from, smallest, several = READY, nil, string.find(labels, ',', 1, true)
    if labels ~= '-' then
      for label in string.gmatch(labels, '[^,]+') do
        local size = call('ZCARD', READY .. '@' .. label)
        if not smallest or size < smallest then from, smallest = READY .. '@' .. label, size end
      end
    end
    local order, first = strategy == 'weighted' and 'ZREVRANGE' or 'ZRANGE', 0
    if strategy == 'random' or strategy == 'peak_ewma' then
      turn = turn + 1
      first = turn % math.max(1, smallest or call('ZCARD', from))
    end
    if not several then return call(order, from, first, first)[1] end
    local function among(low, high)
      for at = low, high, 32 do
        local some = call(order, from, at, math.min(high, at + 31))
        for i, record in ipairs(#some > 0 and call('HMGET', STATE, unpack(some)) or {}) do
          if has_all(select(7, match(record or '', RECORD)) or '', labels) then return some[i] end
        end
      end
    end
    return among(first, smallest - 1) or among(0, first - 1)
  end

  -- Hand what is free to those who wait, in order, but to none who fell silent and was not cleared away yet. Those whom
  -- nothing fits do not hold up those behind them, some 130 deep; what was looked for in vain is not looked for again,
  -- since nothing becomes free meanwhile. A grant is stored for CLAIM_MS to be fetched; the message is a hint. False when
  -- it stopped at GRANTS.
  function self.pump()
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
        local token, score, labels, need = tokens[i], match(record or '', '^W (%S+) %d+ (%S+) (%d+)$')
        if live_until[i] and tonumber(live_until[i]) <= now_ms then labels = nil end
        local id = labels and not vain[labels] and self.best(labels)
        local r = id and self.read(id)
        if r and r.load < r.lim then
          call('ZREM', WAITQ, token)
          call('ZREM', DUE, 'W' .. token)
          self.grant(r, token, now_ms + CLAIM_MS, 'G', score, tonumber(need))
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

  -- Note when the pool needs its next look.
  function self.retime()
    local next_ms = '0'
    if call('ZCARD', WAITQ) == 0 then next_ms = call('ZRANGE', DUE, 0, 0, 'WITHSCORES')[2] or NEVER end
    call('HSET', STATE, '#next', next_ms)
  end

  -- Expiries, then those who wait. Returns how many were due, and whether all who wait and can be served are.
  function self.tidy(limit)
    local reaped = self.reap(limit)
    local served = self.pump()
    self.retime()
    return reaped, served
  end

  return self
end
