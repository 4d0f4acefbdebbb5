-- The pool: what its keys hold, and the only code that writes its indexes (ready, ready@<label>, due, waitq).
-- A script that includes this has named its KEYS STATE, READY, DUE and WAITQ.
--
--   state HASH  the truth. Fields are told apart by their first character:
--     <id>      instance: load lim seq fence peak weight labels | flags cap ewma_us ewma_ms served failed fails
--               lim: units that may be leased now, 0 while it takes no work, so that ready <=> load < lim
--               seq: #picks at its last pick    fence: its last fencing number    fails: bad outcomes in a row
--               flags: - or letters of  s silent (heartbeat missed)  u unhealthy  d draining  r removed
--     @<token>  lease "L <id> <fence> <late>", late 1 when a copy of its request may still be under way
--               grant, not fetched yet "G <id> <fence> <score>" | in line "W <score> <ttl_ms> <labels>"
--               tombstone "X <why>": r released  e expired  u not fetched  c cancelled
--     #pool     "<schema> <strategy>"    #born  when it was founded, us    #picks  leases granted so far    #load #cap  sums over the instances
--     #next     when the pool needs a look, ms: a lower bound of due; 0 while somebody waits
--   ready ZSET  <id> -> score by strategy; ready@<label>, computed here under the same tag, likewise
--   due   ZSET  @<token> lease or grant ends | W@<token> waiter fell silent | X@<token> tombstone goes | H:<id> heartbeat -> ms
--   waitq ZSET  @<token> -> arrival, us, less its priority; its name is also the channel on which grants are announced
local call, match, format, floor = redis.call, string.match, string.format, math.floor
local SCHEMA, POOL = '1', '^1 (%S+)$'
local RECORD = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+%.?%d*) (%S+) (%S+ %d+ %d+ %d+ %d+ %d+ %d+)$'
local REST = '^(%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local DONE, NOTHING, SPENT, OTHER_STRATEGY, OTHER_SCHEMA, CORRUPT, TOO_LATE = 1, 0, -1, -2, -3, -4, -6

-- Reject a poisoned index before the first write. What script text names no label for costs nothing.
local function check(labels)
  call('ZCARD', READY)
  if labels ~= '-' then
    for label in string.gmatch(labels, '[^,]+') do call('ZCARD', READY .. '@' .. label) end
  end
end

-- Which of the pool's numbers is none: arithmetic on it would fail after the first write. Given as read, or else read here.
local function whole(text) return not text or (#text <= 16 and match(text, '^%-?%d+$')) end
local function odd(next_ms, picks, load, cap)
  if not next_ms then next_ms, picks, load, cap = unpack(call('HMGET', STATE, '#next', '#picks', '#load', '#cap')) end
  return not whole(next_ms) and '#next' or not whole(picks) and '#picks' or not whole(load) and '#load'
    or not whole(cap) and '#cap' or nil
end

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

-- Put an instance where its record says it belongs. was: whether it was ready before, nil when that is not known.
--   least_loaded, power_of_two, consistent_hash: relative load in 1/8192, then the least recently picked;
--   exact for capacities up to 90 and 2^40 picks, and below 2^53 in all. round_robin: the least recently picked.
--   weighted: weight * (1 - load/lim), the likelihood of a pick. random, peak_ewma: membership alone.
local function index(strategy, id, load, lim, seq, weight, labels, was)
  local score = '0'
  if load < lim then
    if strategy == 'round_robin' then
      score = seq
    elseif strategy == 'weighted' then
      score = format('%.0f', floor(weight * 1e9 * (lim - load) / lim))
    elseif strategy ~= 'random' and strategy ~= 'peak_ewma' then
      score = format('%.0f', floor(load * 8192 / lim) * 1099511627776 + seq)
    elseif was then
      return
    end
    call('ZADD', READY, score, id)
  elseif was == false then
    return
  else
    score = nil
    call('ZREM', READY, id)
  end
  if labels ~= '-' then
    for label in string.gmatch(labels, '[^,]+') do
      if score then call('ZADD', READY .. '@' .. label, score, id) else call('ZREM', READY .. '@' .. label, id) end
    end
  end
end

-- What is needed seldom: whole records, expiries, handing over. Built only when asked for, since building these
-- functions costs each call about 3 us. Rejects poisoned keys before the first write.
local function upkeep(now_us)
  local CLAIM_MS, TOMBSTONE_MS, NEVER = 3000, 120000, '4503599627370496'
  local GRANTS, FEW, MANY, LOOKS = 16, 4, 32, 5
  if not now_us then
    local clock = call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
  end
  local now_ms = floor(now_us / 1000)
  local strategy = match(call('HGET', STATE, '#pool') or '', POOL)
  local self = {now_us = now_us, now_ms = now_ms, strategy = strategy}
  call('ZCARD', READY)
  call('ZCARD', DUE)
  call('ZCARD', WAITQ)

  -- The record of an instance; nil when there is none, or none that we wrote.
  function self.read(id)
    local load, lim, seq, fence, peak, weight, labels, rest = match(call('HGET', STATE, id) or '', RECORD)
    local flags, cap, ewma_us, ewma_ms, served, failed, fails = match(rest or '', REST)
    if not fails then return nil end
    check(labels)
    return {
      id = id, load = tonumber(load), lim = tonumber(lim), seq = seq, fence = tonumber(fence), peak = tonumber(peak),
      weight = weight, labels = labels, flags = flags, cap = tonumber(cap), ewma_us = tonumber(ewma_us),
      ewma_ms = tonumber(ewma_ms), served = tonumber(served), failed = tonumber(failed), fails = tonumber(fails),
      old_load = tonumber(load), old_cap = tonumber(lim) > 0 and tonumber(cap) or 0,
    }
  end

  function self.has(r, flag) return string.find(r.flags, flag, 1, true) ~= nil end

  function self.set(r, flag, on)
    local without = string.gsub(string.gsub(r.flags, '%-', ''), flag, '')
    r.flags = on and without .. flag or without
    if r.flags == '' then r.flags = '-' end
  end

  -- Give other labels. Takes it out of all label indexes; `store` puts it into those it has.
  function self.relabel(r, labels)
    if r.labels ~= '-' and r.labels ~= labels then
      for label in string.gmatch(r.labels, '[^,]+') do call('ZREM', READY .. '@' .. label, r.id) end
    end
    r.labels = labels
  end

  -- Write a record back: lim follows from flags and capacity, a removed and empty one goes, sums and indexes follow.
  function self.store(r)
    r.lim = r.flags == '-' and r.cap or 0
    if r.load ~= r.old_load then call('HINCRBY', STATE, '#load', r.load - r.old_load) end
    local cap = r.lim > 0 and r.cap or 0
    if cap ~= r.old_cap then call('HINCRBY', STATE, '#cap', cap - r.old_cap) end
    r.old_load, r.old_cap = r.load, cap
    if self.has(r, 'r') and r.load == 0 then
      call('HDEL', STATE, r.id)
    else
      call('HSET', STATE, r.id, format('%d %d %s %.0f %d %s %s %s %d %.0f %.0f %.0f %.0f %.0f', r.load, r.lim, r.seq, r.fence,
        r.peak, r.weight, r.labels, r.flags, r.cap, r.ewma_us, r.ewma_ms, r.served, r.failed, r.fails))
    end
    index(strategy, r.id, r.load, r.lim, r.seq, r.weight, r.labels, nil)
  end

  -- Remember that a token is spent. The ZREM removes nothing: it is a first write that is allowed at maxmemory, and
  -- after a first write memory is not asked for again.
  function self.bury(token, why, keep_ms)
    call('ZREM', DUE, token)
    call('HSET', STATE, token, 'X ' .. why)
    call('ZADD', DUE, format('%.0f', now_ms + (keep_ms or TOMBSTONE_MS)), 'X' .. token)
  end

  function self.give_back(id)
    local r = self.read(id)
    if r and r.load > 0 then
      r.load = r.load - 1
      self.store(r)
    end
  end

  -- Fencing numbers rise per instance, over a restart that lost them too, as long as the clock does.
  function self.next_fence(fence) return fence < now_us and now_us or fence + 1 end

  -- Deal with at most limit things that are due; returns how many there were.
  function self.reap(limit)
    local names = call('ZRANGEBYSCORE', DUE, '-inf', format('%.0f', now_ms), 'LIMIT', 0, limit)
    for _, name in ipairs(names) do
      local kind, rest = string.sub(name, 1, 1), string.sub(name, 2)
      call('ZREM', DUE, name)
      if kind == '@' then
        local what, id = match(call('HGET', STATE, name) or '', '^([LG]) (%S+)')
        if what then
          self.give_back(id)
          self.bury(name, what == 'L' and 'e' or 'u')
        end
      elseif kind == 'W' then
        call('ZREM', WAITQ, rest)
        call('HDEL', STATE, rest)
      elseif kind == 'X' then
        if string.sub(call('HGET', STATE, rest) or '', 1, 1) == 'X' then call('HDEL', STATE, rest) end
      elseif kind == 'H' then
        local r = self.read(string.sub(rest, 2))
        if r then
          self.set(r, 's', true)
          self.store(r)
        end
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
          local its = ',' .. (select(7, match(record or '', RECORD)) or '') .. ','
          local fits = true
          for label in string.gmatch(labels, '[^,]+') do fits = fits and string.find(its, ',' .. label .. ',', 1, true) end
          if fits then return some[i] end
        end
      end
    end
    return among(first, smallest - 1) or among(0, first - 1)
  end

  -- Hand what is free to those who wait, in order. Those whom nothing fits do not hold up those behind them, some 130
  -- deep; what was looked for in vain is not looked for again, since nothing becomes free meanwhile. A grant is stored
  -- for CLAIM_MS to be fetched; the message is a hint. False when it stopped at GRANTS.
  function self.pump()
    if call('ZCARD', WAITQ) == 0 then return true end
    local at, granted, vain = 0, 0, {}
    for look = 1, LOOKS do
      if call('ZCARD', READY) == 0 then return true end
      local tokens = call('ZRANGE', WAITQ, at, at + (look == 1 and FEW or MANY) - 1)
      if #tokens == 0 then return true end
      for i, record in ipairs(call('HMGET', STATE, unpack(tokens))) do
        local token, score, labels = tokens[i], match(record or '', '^W (%S+) %d+ (%S+)$')
        local id = labels and not vain[labels] and self.best(labels)
        local r = id and self.read(id)
        if r and r.load < r.lim then
          call('ZREM', WAITQ, token)
          call('ZREM', DUE, 'W' .. token)
          r.load, r.fence = r.load + 1, self.next_fence(r.fence)
          r.peak = math.max(r.peak, r.load)
          r.seq = format('%.0f', call('HINCRBY', STATE, '#picks', 1))
          call('ZADD', DUE, format('%.0f', now_ms + CLAIM_MS), token)
          call('HSET', STATE, token, format('G %s %.0f %s', id, r.fence, score))
          self.store(r)
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
