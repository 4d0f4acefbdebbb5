-- Health and capacity: what an instance may bear now, by its outcomes, its checks, its age and its rates.
-- Expects what pool.lua expects. `upkeep` adds these functions to its own.
--   Ejection follows Envoy's outlier detection: so many bad outcomes in a row, for a time that doubles, within a cap, never
--   the last; then a probe at a time. Panic, as there: when too many are unfit, the judgement is doubted, not they.
--   Limits follow additive increase, multiplicative decrease: one step down a round trip, and up only while in use.
--   Rates follow the generic cell rate algorithm (ITU-T I.371): an instance that has none left is parked until it has.
local function health(self, facts)
  local EVENTS_KEPT, BATCH, TENTHS, CUT = 1000, 64, 10, 0.8
  local TAG = string.sub(READY, 1, -6)
  local AWAY, EVENTS = TAG .. 'away', TAG .. 'events'
  local now_us, now_ms = self.now_us, self.now_ms
  local usable, out, warming = facts.usable, facts.out, facts.warming
  local settings
  self.panic = facts.panic
  call('ZCARD', AWAY)
  call('XLEN', EVENTS)

  function self.tell(kind, id, ...)
    call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'id', id, ...)
  end

  -- The pool's settings; without any, nothing is judged.
  function self.settings()
    if not settings then
      local of = {match(facts.settings or '', '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')}
      for i = 1, 11 do of[i] = tonumber(of[i] or 0) end
      settings = {
        eject_after = of[1], eject_ms = of[2], eject_most_ms = of[3], eject_share = of[4], panic_share = of[5],
        adaptive = of[7] == 1, ramp_ms = of[8], burst_us = of[9] * 1000, fall = of[10], rise = of[11],
      }
    end
    return settings
  end

  -- What #pool says: what each acquire and release has to know.
  function self.pool_fact(of_strategy, text)
    local slow_us = match(text, '^%d+ %d+ %d+ %d+ %d+ (%d+) ') or '0'
    return SCHEMA .. ' ' .. of_strategy .. (slow_us ~= '0' and ' ' .. slow_us or '')
  end

  function self.has(r, flag) return string.find(r.flags, flag, 1, true) ~= nil end

  function self.set(r, flag, on)
    local without = string.gsub(string.gsub(r.flags, '%-', ''), flag, '')
    r.flags = on and without .. flag or without
    if r.flags == '' then r.flags = '-' end
  end

  -- What few instances have; made when first needed.
  function self.more(r)
    r.more = r.more or {
      ejects = 0, until_ms = 0, since_us = 0, old = 0, limit = 0, cut_us = 0, warm = 0, checks = 0, checked_ms = 0,
      rpm = '0', tpm = '0', rpm_us = 0, tpm_us = 0, beat_ms = 0,
    }
    return r.more
  end

  -- Units that may be leased on it now: a function of its record, and of panic.
  function self.limit(r)
    if string.find(r.flags, '[sudrp]') or (string.find(r.flags, '[ec]') and not self.panic) then return 0 end
    local lim, more = r.cap, r.more
    if r.flags == '-' or not more then return lim end
    if self.has(r, 'a') then lim = math.min(lim, math.max(1, floor(more.limit / 1000))) end
    if self.has(r, 'w') then lim = math.min(lim, math.max(1, floor(r.cap * more.warm / TENTHS))) end
    if self.has(r, 'h') and not self.panic then lim = math.min(lim, more.old + 1) end
    return lim
  end

  local function parked_until_us(r)
    local more = r.more
    if not more or not self.has(r, 'l') then return 0 end
    return math.max(more.rpm ~= '0' and more.rpm_us or 0, more.tpm ~= '0' and more.tpm_us or 0) - self.settings().burst_us
  end

  -- Panic turns: those who are unfit get work, or get none any more. A batch now, the others as things that are due. A scan
  -- misses nobody who is there all the while, and who comes or goes meanwhile is stored by that.
  function self.resettle(cursor)
    local scan = call('ZSCAN', AWAY, cursor, 'COUNT', BATCH)
    for i = 1, #scan[2], 2 do
      local r = self.read(scan[2][i])
      if r then self.store(r) end
    end
    if scan[1] ~= '0' then call('ZADD', DUE, format('%.0f', now_ms), 'P:' .. scan[1]) end
  end

  -- Compare the share of the unfit with what the settings allow.
  function self.weigh()
    local panic = usable > 0 and out * 1000 > usable * self.settings().panic_share and self.settings().panic_share > 0
    if panic == self.panic then return false end
    self.panic = panic
    if panic then
      call('HSET', STATE, '#panic', format('%.0f', now_ms))
    else
      facts.calm_ms = now_ms
      call('HDEL', STATE, '#panic')
      call('HSET', STATE, '#calm', format('%.0f', now_ms))
    end
    self.tell(panic and 'panic' or 'calm', '-', 'unfit', format('%d', out), 'of', format('%d', usable))
    return true
  end

  local function write_counts()
    call('HSET', STATE, '#usable', format('%d', usable), '#out', format('%d', out), '#warming', format('%d', warming))
  end

  -- What an instance counts as, by its flags: usable, judged unfit, or fit but warming up; 1 or 0 each.
  function self.counts(flags)
    if string.find(flags, '[sudr]') then return 0, 0, 0 end
    if string.find(flags, '[ech]') then return 1, 1, 0 end
    return 1, 0, string.find(flags, 'w', 1, true) and 1 or 0
  end

  local function is_away(flags) return string.find(flags, '[echp]') and not string.find(flags, '[sudr]') end

  -- Count an instance that is about to be stored. Returns whether panic turned.
  function self.count(r)
    local was, is = r.old_flags, r.flags
    local turned = false
    if was ~= is then
      local was_usable, was_out, was_warming = self.counts(was)
      local is_usable, is_out, is_warming = self.counts(is)
      if was_usable ~= is_usable or was_out ~= is_out or was_warming ~= is_warming then
        usable, out, warming = usable + is_usable - was_usable, out + is_out - was_out, warming + is_warming - was_warming
        write_counts()
        turned = self.weigh()
      end
    end
    if is_away(is) then
      local back_ms = 0
      if not string.find(is, '[ch]') then
        back_ms = math.max(self.has(r, 'e') and self.more(r).until_ms or 0, math.ceil(parked_until_us(r) / 1000))
      end
      call('ZADD', AWAY, format('%.0f', back_ms), r.id)
    elseif string.find(was, '[echp]') then
      call('ZREM', AWAY, r.id)
    end
    r.old_flags = is
    return turned
  end

  -- Write the counts anew, as `repair` found them.
  function self.recount(of_usable, of_out, of_warming)
    usable, out, warming = of_usable, of_out, of_warming
    write_counts()
    if self.weigh() then self.resettle('0') end
  end

  local function step(r)
    call('ZADD', DUE, format('%.0f', now_ms + math.ceil(self.settings().ramp_ms / TENTHS)), 'V:' .. r.id)
  end

  -- Give it its capacity by and by, if others are there to bear the load meanwhile: those that are fit and warm themselves,
  -- and no minority. A fleet that comes back together is needed whole: in panic, and for one step after it.
  function self.warm_up(r)
    local ramp_ms, others = self.settings().ramp_ms, usable - out - warming
    if ramp_ms == 0 or others < 1 or 2 * others < usable then return end
    if self.panic or (now_ms - facts.calm_ms) * TENTHS <= ramp_ms then return end
    self.more(r).warm = 1
    self.set(r, 'w', true)
    step(r)
  end

  local function eject(r)
    local more, of = self.more(r), self.settings()
    if now_ms - more.until_ms > of.eject_most_ms then more.ejects = 0 end
    local for_ms = math.min(of.eject_ms * 2 ^ more.ejects, of.eject_most_ms)
    more.ejects, more.since_us = math.min(more.ejects + 1, 30), now_us
    more.until_ms = math.max(more.until_ms, now_ms + for_ms)
    r.fails = 0
    self.set(r, 'h', false)
    self.set(r, 'w', false)
    self.set(r, 'e', true)
    call('ZREM', DUE, 'V:' .. r.id)
    call('ZADD', DUE, format('%.0f', more.until_ms), 'E:' .. r.id)
    self.tell('ejected', r.id, 'for_ms', format('%.0f', for_ms), 'in_a_row', format('%d', more.ejects))
  end

  -- Back in rotation.
  function self.recover(r)
    self.set(r, 'e', false)
    self.set(r, 'h', false)
    r.fails = 0
    call('ZREM', DUE, 'E:' .. r.id)
    self.warm_up(r)
    self.tell('recovered', r.id)
  end

  -- Whether one more may be ejected, that one counted: within the cap, or the first; and not the last that is fit.
  local function may_eject()
    return usable - out >= 2 and out + 1 <= math.max(1, floor(usable * self.settings().eject_share / 1000))
  end

  -- Take the end of a lease into the record.
  function self.unload(r, fence)
    r.load = math.max(0, r.load - 1)
    if r.more and self.has(r, 'h') and fence < r.more.since_us then r.more.old = math.max(0, r.more.old - 1) end
  end

  -- What an outcome says of its instance. kind: o ok, s ok but slow, e t j as release.lua has them; fence: of the lease,
  -- which is also when it was granted.
  function self.judge(r, kind, fence)
    local of, good = self.settings(), kind == 'o'
    local overload = kind ~= 'o' and kind ~= 'e'
    if good or kind == 's' then r.served = r.served + 1 else r.failed = r.failed + 1 end
    if of.adaptive then
      local full = r.cap * 1000
      local limit = self.has(r, 'a') and self.more(r).limit or full
      if good then
        if limit < full and 2 * (r.load + 1) >= r.lim then limit = limit + 1000000 / limit end
      elseif fence > self.more(r).cut_us then
        limit, r.more.cut_us = math.max(1000, floor(limit * CUT)), now_us
      end
      -- Too much at once is no illness, as long as less at once is an answer to it.
      overload = overload and limit > 1000
      if limit < full then self.more(r).limit = limit end
      self.set(r, 'a', limit < full)
    else
      self.set(r, 'a', false)
      overload = false
    end
    if good then r.fails = 0 elseif not overload then r.fails = r.fails + 1 end
    local on_probation = r.more and fence >= r.more.since_us
    if self.has(r, 'h') then
      if on_probation and good then self.recover(r) elseif on_probation then eject(r) end
    elseif self.has(r, 'e') then
      if good and on_probation then
        self.recover(r)
      elseif not good then  -- it is as ill as it was: the later end holds
        local for_ms = math.min(of.eject_ms * 2 ^ math.max(0, r.more.ejects - 1), of.eject_most_ms)
        r.more.until_ms = math.max(r.more.until_ms, now_ms + for_ms)
        call('ZADD', DUE, format('%.0f', r.more.until_ms), 'E:' .. r.id)
      end
    elseif not good and of.eject_after > 0 and r.fails >= of.eject_after and not string.find(r.flags, '[sudrc]') then
      if may_eject() then eject(r) end
    end
  end

  -- What an active check says that was taken on at a moment; one that was taken on later has the say.
  function self.checked(r, good, at_ms)
    local of, more = self.settings(), self.more(r)
    if at_ms <= more.checked_ms then return end
    more.checked_ms = at_ms
    if (more.checks < 0) == good then more.checks = 0 end
    more.checks = math.max(-1000, math.min(1000, more.checks + (good and 1 or -1)))
    if not good and -more.checks >= of.fall and not self.has(r, 'c') then
      self.set(r, 'c', true)
      self.tell('down', r.id, 'checks', format('%d', -more.checks))
    elseif good and more.checks >= of.rise and self.has(r, 'c') then
      self.set(r, 'c', false)
      self.warm_up(r)
      self.tell('up', r.id, 'checks', format('%d', more.checks))
    end
  end

  -- Park it if it has nothing left of its rates, until it has; or let it go on.
  function self.park(r)
    local until_us = parked_until_us(r)
    if until_us > now_us then
      self.set(r, 'p', true)
      call('ZADD', DUE, format('%.0f', math.ceil(until_us / 1000)), 'R:' .. r.id)
    elseif self.has(r, 'p') then
      self.set(r, 'p', false)
      call('ZREM', DUE, 'R:' .. r.id)
    end
  end

  -- Count a request of so many tokens against its rates. One that begins while there is something left may take more than
  -- that; what follows waits the longer.
  function self.meter(r, tokens)
    local more = self.more(r)
    if more.rpm ~= '0' then more.rpm_us = math.max(more.rpm_us, now_us) + math.ceil(60000000 / more.rpm) end
    if more.tpm ~= '0' then more.tpm_us = math.max(more.tpm_us, now_us) + math.ceil(tokens * 60000000 / more.tpm) end
    self.park(r)
  end

  -- It took so many tokens more, or fewer, than were counted.
  function self.true_up(r, tokens)
    local more = r.more
    if not more or more.tpm == '0' then return end
    more.tpm_us = math.max(0, math.max(more.tpm_us, now_us) + math.ceil(tokens * 60000000 / more.tpm))
    self.park(r)
  end

  -- Milliseconds until an instance comes back, when nothing else can bring capacity: all are unfit or have no rate left. In
  -- panic the unfit have work, and its end may bring capacity.
  function self.back_after_ms()
    local soonest = not self.panic and usable > 0 and call('ZCARD', AWAY) == usable and call('ZRANGE', AWAY, 0, 0, 'WITHSCORES')[2]
    return soonest and tonumber(soonest) > now_ms and soonest - now_ms or nil
  end

  -- Have what is to become of it by itself become due again, where that was lost.
  function self.rearm(r)
    local function lost(kind) return not call('ZSCORE', DUE, kind .. r.id) end
    if self.has(r, 'e') and lost('E:') then call('ZADD', DUE, format('%.0f', self.more(r).until_ms), 'E:' .. r.id) end
    if self.has(r, 'w') and lost('V:') then step(r) end
    self.park(r)
  end

  -- Drop who is said to be away and is not, or is none.
  function self.sweep_away()
    for _, id in ipairs(call('ZRANGE', AWAY, 0, -1)) do
      local r = self.read(id)
      if not r or not is_away(r.flags) then call('ZREM', AWAY, id) end
    end
  end

  -- Something of an instance is due.
  function self.timer(kind, id)
    local r = self.read(id)
    if not r then return end
    if kind == 'H' and not self.has(r, 'r') then
      self.set(r, 's', true)
      self.tell('silent', id)
    elseif kind == 'E' and self.has(r, 'e') then
      local more = self.more(r)
      self.set(r, 'e', false)
      self.set(r, 'h', true)
      more.since_us, more.old = now_us, r.load
      self.tell('probing', id)
    elseif kind == 'V' and self.has(r, 'w') then
      local more = self.more(r)
      more.warm = more.warm + 1
      if more.warm >= TENTHS then
        self.set(r, 'w', false)
        self.tell('warm', id)
      else
        step(r)
      end
    elseif kind == 'R' then
      self.park(r)
    end
    self.store(r)
  end
end
