-- Health and capacity. The functions compute how many leases an instance may have now, from its outcomes, checks,
-- warm-up and rate limits. `maintenance` adds the functions to the object that it returns. Needs strategies.lua,
-- field.lua, whole_records.lua and pool.lua.
--   Ejection follows Envoy's outlier detection. After a number of bad outcomes in a row, an instance is ejected. Each
--   further ejection in a row lasts twice as long, up to a maximum. While too many instances are unhealthy, no healthy
--   instance is ejected (see `may_eject`). The last healthy instance is never ejected. After an ejection, one probe at
--   a time is allowed.
--   Panic also follows Envoy. When too many instances are unhealthy, the health data is probably wrong. So unhealthy
--   instances get work too.
--   Adaptive limits follow additive increase, multiplicative decrease (AIMD). The outcome of a lease lowers a limit
--   only if the lease was granted after the last lowering of the limit. A limit is raised only while the instance uses
--   at least half of it.
--   Rate limits follow the generic cell rate algorithm (GCRA, ITU-T I.371). An instance that has used up a limit is
--   rate-limited until the limit recovers.
--   An instance rests after it refused work because of its own rate limit (HTTP status 429), or on request of a caller.
--   A resting instance gets no lease, even in panic. Only `mark_healthy` and `remove` shorten a rest.

-- Decode the text of #settings. Returns the settings, and whether the library wrote the text. Without a text, every
-- setting is 0, so there are no ejections, adaptive limits, warm-ups or panics. A single pattern checks and splits the
-- usual text. The pattern does not limit the lengths of the numbers, because that would be slower. The lengths are
-- checked afterwards: a number has at most 12 characters.
local function read_settings(text)
  local USUAL = '^eject_after=(%d+) base_ejection_ms=(%d+) max_ejection_ms=(%d+) max_ejection_share=(%d%.?%d*) '
    .. 'panic_threshold=(%d%.?%d*) slow_after_us=(%d+) adaptive=(%d) slow_start_ms=(%d+) rate_burst_ms=(%d+) '
    .. 'unhealthy_threshold=(%d+) healthy_threshold=(%d+)$'
  local after, base, max, share, panic, slow, adaptive, start, burst, down, up = match(text or '', USUAL)
  local is_valid = after and #after <= 12 and #base <= 12 and #max <= 12 and #share <= 12 and #panic <= 12
    and #slow <= 12 and #start <= 12 and #burst <= 12 and #down <= 12 and #up <= 12
  if not is_valid then
    after, base, max, share, panic, slow, adaptive, start, burst, down, up = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
  end
  local settings = {
    eject_after = after + 0, base_ejection_ms = base + 0, max_ejection_ms = max + 0, max_ejection_share = share + 0,
    panic_threshold = panic + 0, slow_after_us = slow + 0, adaptive = adaptive + 0, slow_start_ms = start + 0,
    rate_burst_ms = burst + 0, unhealthy_threshold = down + 0, healthy_threshold = up + 0,
  }
  if not is_valid then
    is_valid = text ~= ''
    for word in string.gmatch(text or '', '%S+') do
      local name, value = match(word, '^([%a_]+)=(%d+%.?%d*)$')
      if not name or #value > 12 then return settings, false end
      settings[name] = value + 0
    end
  end
  -- Shares are compared in whole thousandths: in floating point, a share of 0.29 of 100 instances is less than 29.
  settings.max_ejection_share = floor(settings.max_ejection_share * 1000 + 0.5)
  settings.panic_threshold = floor(settings.panic_threshold * 1000 + 0.5)
  return settings, is_valid
end

-- Add the functions below to the object `self`, and the pool's settings as `self.settings`.
local function health(self, facts)
  local EVENTS_KEPT, BATCH, TENTHS, CUT, DAY_MS = 1000, 64, 10, 0.8, 86400000
  local DISABLED, UNHEALTHY = {'heartbeat_missed', 'unhealthy', 'draining', 'removed'}, {'ejected', 'down', 'half_open'}
  local TAG = string.sub(READY, 1, -6)
  local AWAY, EVENTS = TAG .. 'away', TAG .. 'events'
  local now_us, now_ms = self.now_us, self.now_ms
  local usable, unhealthy, warming = facts.usable, facts.unhealthy, facts.warming
  local calm_ms = facts.calm_ms <= now_ms and facts.calm_ms or 0  -- 0 after the server's clock was set back
  local settings, is_valid = read_settings(facts.settings)
  self.panic, self.settings = facts.panic, settings
  if not is_valid then self.invalid = self.invalid or '#settings' end
  call('ZCARD', AWAY)
  call('XLEN', EVENTS)

  function self.add_event(kind, id, ...)
    call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'id', id, ...)
  end

  -- Return the text of #pool, which every acquire and release reads.
  function self.pool_fact(strategy, of_settings)
    return write_pool(strategy, field(of_settings, 'slow_after_us') or '0')
  end

  -- Convert the flags of a record from text to a set.
  function self.flags_of(text)
    local flags = {}
    if text ~= '-' then
      for flag in string.gmatch(text, '[^,]+') do flags[flag] = true end
    end
    return flags
  end

  -- Convert a set of flags to the text in a record; the inverse of `flags_of`.
  function self.flags_text(flags)
    local names = {}
    for flag in pairs(flags) do names[#names + 1] = flag end
    if not names[1] then return '-' end
    table.sort(names)
    return table.concat(names, ',')
  end

  function self.set(r, flag, on) r.flags[flag] = on or nil end

  local function any(flags, names)
    for _, flag in ipairs(names) do
      if flags[flag] then return true end
    end
    return false
  end

  local function is_away(flags)
    return not any(flags, DISABLED) and (any(flags, UNHEALTHY) or flags.rate_limited or flags.resting) and true or false
  end

  function self.extra(r)
    r.extra = r.extra or self.no_extra()
    return r.extra
  end

  -- Compute how many leases an instance may have now. The result depends only on `r` and on whether there is panic.
  function self.limit(r)
    local flags, extra = r.flags, r.extra
    if any(flags, DISABLED) or flags.rate_limited or flags.resting then return 0 end
    if (flags.ejected or flags.down) and not self.panic then return 0 end
    local limit = r.cap
    if not extra then return limit end
    if flags.adaptive then limit = math.min(limit, math.max(1, floor(extra.adaptive_limit_milli / 1000))) end
    if flags.warming then limit = math.min(limit, math.max(1, floor(r.cap * extra.warm_tenths / TENTHS))) end
    if flags.half_open and not self.panic then limit = math.min(limit, extra.leases_before + 1) end
    return limit
  end

  -- Return the lowest fencing token that the next grant on an instance can have: the present time, or the last token
  -- plus one, whichever is higher. After the server's clock was set back, the last token may be higher than the present
  -- time.
  local function after_last_grant_us(r) return math.max(now_us, r.fence + 1) end

  -- Correct the arrival times of the two rate limits (rpm_arrival_us and tpm_arrival_us in pool.lua) after the server's
  -- clock was set back. The arrival times were last changed at metered_us. If metered_us is in the future, the arrival
  -- times are shifted back by the time from now to metered_us. Returns whether the arrival times were shifted.
  local function correct_arrivals(extra)
    local ahead_us = extra.metered_us - now_us
    if ahead_us <= 0 then return false end
    extra.metered_us = now_us
    extra.rpm_arrival_us = math.max(0, extra.rpm_arrival_us - ahead_us)
    extra.tpm_arrival_us = math.max(0, extra.tpm_arrival_us - ahead_us)
    return true
  end

  -- Return the new arrival time of a rate limit after `tokens` units of the limit were used. A unit is a token or a
  -- request. The new time is `tokens` / `rate` minutes after the old arrival time or after now, whichever is later. It
  -- is at most MAX_US (about three years) after now.
  local function advanced_us(arrival_us, tokens, rate)
    local MAX_US = 1e14
    return math.max(0, math.min(math.max(arrival_us, now_us) + math.ceil(tokens * 60000000 / rate), now_us + MAX_US))
  end

  local function rate_limited_until_us(r)
    local extra = r.extra
    if not extra or not r.flags.metered then return 0 end
    return math.max(extra.rpm ~= '0' and extra.rpm_arrival_us or 0, extra.tpm ~= '0' and extra.tpm_arrival_us or 0)
      - settings.rate_burst_ms * 1000
  end

  -- When panic begins or ends, the limits of unhealthy instances change. So `store`, which computes the limit of an
  -- instance, is called for all instances in `away`. A call of `store_away` processes one batch of these instances; a
  -- timer in `due` starts the next batch. ZSCAN returns every instance that stays in `away` during the whole scan. If a
  -- script adds an instance to `away` or removes one during the scan, the script calls `store` for this instance.
  function self.store_away(cursor)
    local scan = call('ZSCAN', AWAY, cursor, 'COUNT', BATCH)
    for i = 1, #scan[2], 2 do
      local r = self.read(scan[2][i])
      if r then self.store(r) end
    end
    if scan[1] ~= '0' then call('ZADD', DUE, format('%.0f', now_ms), 'P:' .. scan[1]) end
  end

  -- Begin or end panic, depending on the share of unhealthy instances. Returns whether panic began or ended.
  function self.update_panic()
    local threshold = settings.panic_threshold
    local panic = usable > 0 and unhealthy * 1000 > usable * threshold and threshold > 0
    if panic == self.panic then return false end
    self.panic = panic
    if panic then
      call('HSET', STATE, '#panic', format('%.0f', now_ms))
    else
      calm_ms = now_ms
      call('HDEL', STATE, '#panic')
      call('HSET', STATE, '#calm', format('%.0f', now_ms))
    end
    self.add_event(panic and 'panic' or 'calm', '-', 'unhealthy', format('%d', unhealthy), 'of', format('%d', usable))
    return true
  end

  self.usable = usable
  local function write_counts()
    self.usable = usable
    call('HSET', STATE, '#usable', format('%d', usable), '#unhealthy', format('%d', unhealthy),
      '#warming', format('%d', warming))
  end

  -- Return three numbers, each 1 for yes or 0 for no: whether an instance with these flags counts as usable, as
  -- unhealthy, and as healthy but warming up.
  function self.counts(flags)
    if any(flags, DISABLED) then return 0, 0, 0 end
    if any(flags, UNHEALTHY) then return 1, 1, 0 end
    return 1, 0, flags.warming and 1 or 0
  end

  -- Update the pool's counts and `away` for an instance that is about to be stored. Returns whether panic began or
  -- ended.
  function self.count(r)
    local is, is_text = r.flags, self.flags_text(r.flags)
    local was = is_text == r.old_flags and is or self.flags_of(r.old_flags)
    local changed = false
    local was_usable, was_unhealthy, was_warming = self.counts(was)
    local is_usable, is_unhealthy, is_warming = self.counts(is)
    if was_usable ~= is_usable or was_unhealthy ~= is_unhealthy or was_warming ~= is_warming then
      usable, unhealthy = usable + is_usable - was_usable, unhealthy + is_unhealthy - was_unhealthy
      warming = warming + is_warming - was_warming
      write_counts()
      changed = self.update_panic()
    end
    if is_away(is) then
      local back_ms = math.ceil(rate_limited_until_us(r) / 1000)
      if is.resting then back_ms = math.max(back_ms, self.extra(r).rest_until_ms) end
      if self.panic then
        if not is.resting and not is.rate_limited then back_ms = 0 end
      elseif is.down or (is.half_open and not is.resting) then
        back_ms = 0
      elseif is.ejected then
        back_ms = math.max(back_ms, self.extra(r).ejected_until_ms)
      end
      call('ZADD', AWAY, format('%.0f', math.max(0, back_ms)), r.id)
    elseif any(was, UNHEALTHY) or was.rate_limited or was.resting then
      call('ZREM', AWAY, r.id)
    end
    r.old_flags = is_text
    return changed
  end

  -- Replace the counts with those that `repair` computed.
  function self.recount(of_usable, of_unhealthy, of_warming)
    usable, unhealthy, warming = of_usable, of_unhealthy, of_warming
    write_counts()
    if self.update_panic() then self.store_away('0') end
  end

  local function schedule_step(r)
    local step_ms = math.ceil(settings.slow_start_ms / TENTHS)
    call('ZADD', DUE, format('%.0f', now_ms + step_ms), 'V:' .. r.id)
  end

  -- Start the warm-up of an instance, but only if at least half of the usable instances are healthy and warm. Those
  -- instances must carry the load during the warm-up. When a whole fleet comes back at once, all of its capacity is
  -- needed. Therefore no instance starts a warm-up during a panic or within one warm-up step after the panic.
  function self.warm_up(r)
    local slow_start_ms, others = settings.slow_start_ms, usable - unhealthy - warming
    if slow_start_ms == 0 or others < 1 or 2 * others < usable then return end
    if self.panic or (now_ms - calm_ms) * TENTHS <= slow_start_ms then return end
    self.extra(r).warm_tenths = 1
    self.set(r, 'warming', true)
    schedule_step(r)
  end

  local function eject(r)
    local extra, of = self.extra(r), settings
    if now_ms - extra.ejected_until_ms > of.max_ejection_ms then extra.ejections = 0 end
    local for_ms = math.min(of.base_ejection_ms * 2 ^ extra.ejections, of.max_ejection_ms)
    extra.ejections, extra.probe_since_us = math.min(extra.ejections + 1, 30), after_last_grant_us(r)
    extra.ejected_until_ms = math.max(extra.ejected_until_ms, now_ms + for_ms)
    r.streak = 0
    self.set(r, 'half_open', false)
    self.set(r, 'warming', false)
    self.set(r, 'ejected', true)
    call('ZREM', DUE, 'V:' .. r.id)
    call('ZADD', DUE, format('%.0f', extra.ejected_until_ms), 'E:' .. r.id)
    self.add_event('ejected', r.id, 'for_ms', format('%.0f', for_ms), 'in_a_row', format('%d', extra.ejections))
  end

  -- After a successful probe, end the ejection of an instance, or the half-open state that follows the ejection.
  function self.recover(r)
    self.set(r, 'ejected', false)
    self.set(r, 'half_open', false)
    r.streak = 0
    call('ZREM', DUE, 'E:' .. r.id)
    self.warm_up(r)
    self.add_event('recovered', r.id)
  end

  -- Whether one more instance may be ejected. The last healthy instance must stay. After the ejection, the share of
  -- unhealthy instances must not exceed max_ejection_share. This limit does not apply to the first unhealthy instance.
  local function may_eject()
    local most = math.max(1, floor(usable * settings.max_ejection_share / 1000))
    return usable - unhealthy >= 2 and unhealthy + 1 <= most
  end

  -- Update the record of an instance for a lease that ends.
  function self.end_lease(r, fence)
    r.load = math.max(0, r.load - 1)
    if r.extra and r.flags.half_open and fence < r.extra.probe_since_us then
      r.extra.leases_before = math.max(0, r.extra.leases_before - 1)
    end
  end

  -- Update the record of an instance with the outcome of a lease.
  --   kind   o: ok; s: ok but slow; e, t, j, l: as in release.lua
  --   fence  the lease's fencing token; usually it is also the time of the grant, us
  function self.record_outcome(r, kind, fence)
    -- Outcome l: the instance refused the work because of its rate limit, so it is alive. This outcome neither begins
    -- nor ends a series of bad outcomes. It ejects no instance and lowers no adaptive limit. release.lua lets the
    -- instance rest.
    if kind == 'l' then
      r.failed = r.failed + 1
      return
    end
    local of, good = settings, kind == 'o'
    local overload = kind ~= 'o' and kind ~= 'e'
    if good or kind == 's' then r.served = r.served + 1 else r.failed = r.failed + 1 end
    if of.adaptive == 1 then
      local full = r.cap * 1000
      local limit = r.flags.adaptive and self.extra(r).adaptive_limit_milli or full
      if good then
        if limit < full and 2 * (r.load + 1) >= r.limit then limit = limit + 1000000 / limit end
      elseif fence > self.extra(r).limit_cut_us then
        limit, r.extra.limit_cut_us = math.max(1000, floor(limit * CUT)), after_last_grant_us(r)
      end
      -- An adaptive limit above 1 lease can still be lowered. In this case, an overload (outcome s, t or j) does not
      -- count as a bad outcome for ejection.
      overload = overload and limit > 1000
      if limit < full then self.extra(r).adaptive_limit_milli = limit end
      self.set(r, 'adaptive', limit < full)
    else
      self.set(r, 'adaptive', false)
      overload = false
    end
    if good then r.streak = 0 elseif not overload then r.streak = r.streak + 1 end
    local is_probe = r.extra and fence >= r.extra.probe_since_us
    if r.flags.half_open then
      if is_probe and good then self.recover(r) elseif is_probe then eject(r) end
    elseif r.flags.ejected then
      if good and is_probe then
        self.recover(r)
      elseif not good then  -- still unhealthy: prolong the ejection, never shorten it
        local for_ms = math.min(of.base_ejection_ms * 2 ^ math.max(0, r.extra.ejections - 1), of.max_ejection_ms)
        r.extra.ejected_until_ms = math.max(r.extra.ejected_until_ms, now_ms + for_ms)
        call('ZADD', DUE, format('%.0f', r.extra.ejected_until_ms), 'E:' .. r.id)
      end
    elseif not good and of.eject_after > 0 and r.streak >= of.eject_after then
      if not any(r.flags, DISABLED) and not r.flags.down and may_eject() then eject(r) end
    end
  end

  -- Update the record of an instance with the result of an active check. claimed_ms: server time when this check was
  -- claimed. checked_ms: server time when the last recorded check was claimed. If checked_ms is in the future, the
  -- server's clock was set back, and the new result counts. Otherwise the new result counts only if claimed_ms is later
  -- than checked_ms.
  function self.record_check(r, good, claimed_ms)
    local of, extra = settings, self.extra(r)
    if claimed_ms <= extra.checked_ms and extra.checked_ms <= now_ms then return end
    extra.checked_ms = claimed_ms
    if (extra.checks < 0) == good then extra.checks = 0 end
    extra.checks = math.max(-1000, math.min(1000, extra.checks + (good and 1 or -1)))
    if not good and -extra.checks >= of.unhealthy_threshold and not r.flags.down then
      self.set(r, 'down', true)
      self.add_event('down', r.id, 'checks', format('%d', -extra.checks))
    elseif good and extra.checks >= of.healthy_threshold and r.flags.down then
      self.set(r, 'down', false)
      self.warm_up(r)
      self.add_event('up', r.id, 'checks', format('%d', extra.checks))
    end
  end

  -- Set or clear the flag rate_limited of an instance, depending on whether one of its rate limits is used up.
  function self.limit_rate(r)
    if r.extra then correct_arrivals(r.extra) end
    local until_us = rate_limited_until_us(r)
    if until_us > now_us then
      self.set(r, 'rate_limited', true)
      call('ZADD', DUE, format('%.0f', math.ceil(until_us / 1000)), 'R:' .. r.id)
    elseif r.flags.rate_limited then
      self.set(r, 'rate_limited', false)
      call('ZREM', DUE, 'R:' .. r.id)
    end
  end

  -- Begin, prolong or end an instance's rest. The end of the rest is stored in rest_until_ms. If the server's clock was
  -- set back after rest_until_ms was stored, rest_until_ms is corrected first.
  --   for_ms  length of the rest from now; a present rest that ends later is not shortened. 0: end the rest now. nil:
  --           only correct rest_until_ms
  --   why     the reason in the event: rate_limited (by an outcome) or cooled_down (by a call of cool_down)
  -- Returns whether rest_until_ms has changed.
  function self.rest(r, for_ms, why)
    if not r.flags.resting and (r.flags.removed or not for_ms or for_ms <= 0) then return false end
    local extra = self.extra(r)
    local until_ms = extra.rest_until_ms
    if for_ms == 0 then
      extra.rest_until_ms, extra.rest_set_ms = 0, 0
      self.set(r, 'resting', false)
      call('ZREM', DUE, 'C:' .. r.id)
      return true
    end
    if extra.rest_set_ms > now_ms then until_ms = math.max(now_ms, until_ms - (extra.rest_set_ms - now_ms)) end
    if for_ms then
      until_ms = math.max(until_ms, now_ms + for_ms)
      if not r.flags.resting then
        self.add_event('resting', r.id, 'for_ms', format('%.0f', for_ms), 'why', why)
        self.set(r, 'resting', true)
      end
    end
    if until_ms == extra.rest_until_ms then return false end
    extra.rest_until_ms, extra.rest_set_ms = until_ms, now_ms
    call('ZADD', DUE, format('%.0f', until_ms), 'C:' .. r.id)
    return true
  end

  -- Count a request, and its tokens, against the rate limits of an instance. A request is granted while some part of
  -- each limit is left. It may use more tokens than are left; in this case, the next requests wait longer.
  function self.count_request(r, tokens)
    local extra = self.extra(r)
    correct_arrivals(extra)
    extra.metered_us = now_us
    if extra.rpm ~= '0' then extra.rpm_arrival_us = advanced_us(extra.rpm_arrival_us, 1, extra.rpm) end
    if extra.tpm ~= '0' then extra.tpm_arrival_us = advanced_us(extra.tpm_arrival_us, tokens, extra.tpm) end
    self.limit_rate(r)
  end

  -- Return how many leases on an instance can be granted now, at most `most`. tokens: the expected tokens of each
  -- lease.
  function self.units(r, most, tokens)
    local free = math.max(0, math.min(r.limit - r.load, most))
    local extra = r.extra
    if not extra or not r.flags.metered then return free end
    local after = {}
    for name, value in pairs(extra) do after[name] = value end
    r.extra = after
    local units = 0
    while units < free and rate_limited_until_us(r) <= now_us do
      if after.rpm ~= '0' then after.rpm_arrival_us = advanced_us(after.rpm_arrival_us, 1, after.rpm) end
      if after.tpm ~= '0' then after.tpm_arrival_us = advanced_us(after.tpm_arrival_us, tokens, after.tpm) end
      units = units + 1
    end
    r.extra = extra
    return units
  end

  -- After a request, correct the number of tokens that count against the instance's limit of tokens per minute. tokens:
  -- tokens used minus tokens counted at the grant; negative if the request used fewer.
  function self.settle(r, tokens)
    local extra = r.extra
    if not extra or extra.tpm == '0' then return end
    correct_arrivals(extra)
    extra.metered_us = now_us
    extra.tpm_arrival_us = advanced_us(extra.tpm_arrival_us, tokens, extra.tpm)
    self.limit_rate(r)
  end

  -- If all usable instances are in `away` (unhealthy, resting or rate-limited), return the milliseconds until the first
  -- of them comes back, at most one day. Otherwise return nil. Also return nil if an instance has the score 0 in
  -- `away`. `count` gives this score to an instance if the time when it comes back is unknown. In panic, `count` also
  -- gives the score 0 to unhealthy instances that take work, because the end of one of their leases may free capacity.
  function self.back_after_ms()
    if usable == 0 or call('ZCARD', AWAY) ~= usable then return nil end
    local soonest_ms = call('ZRANGE', AWAY, 0, 0, 'WITHSCORES')[2]
    return soonest_ms and tonumber(soonest_ms) > now_ms and math.min(soonest_ms - now_ms, DAY_MS) or nil
  end

  -- Correct those times of an instance that are too far in the future because the server's clock was set back. Returns
  -- whether the record has changed.
  function self.correct_times(r)
    local is_changed = r.extra and correct_arrivals(r.extra) or false
    if is_changed then self.limit_rate(r) end
    local max_ms = now_ms + settings.max_ejection_ms
    if r.flags.ejected and self.extra(r).ejected_until_ms > max_ms then
      r.extra.ejected_until_ms = max_ms
      call('ZADD', DUE, format('%.0f', max_ms), 'E:' .. r.id)
      is_changed = true
    end
    if self.rest(r) then is_changed = true end
    local step_at_ms = r.flags.warming and call('ZSCORE', DUE, 'V:' .. r.id)
    if step_at_ms and tonumber(step_at_ms) > now_ms + settings.slow_start_ms then
      self.changed = true
      schedule_step(r)
    end
    return is_changed
  end

  -- Correct the times of an instance, and restore its timers that are missing in `due`, except the heartbeat timer.
  function self.restore_timers(r)
    self.correct_times(r)
    local function lost(kind) return not call('ZSCORE', DUE, kind .. r.id) end
    if r.flags.ejected and lost('E:') then
      call('ZADD', DUE, format('%.0f', self.extra(r).ejected_until_ms), 'E:' .. r.id)
    end
    if r.flags.resting and lost('C:') then
      call('ZADD', DUE, format('%.0f', self.extra(r).rest_until_ms), 'C:' .. r.id)
    end
    if r.flags.warming and lost('V:') then schedule_step(r) end
    self.limit_rate(r)
  end

  -- Remove stale members of `away`: instances that are not away (see `is_away`) or no longer exist.
  function self.sweep_away()
    for _, id in ipairs(call('ZRANGE', AWAY, 0, -1)) do
      local r = self.read(id)
      if not r or not is_away(r.flags) then call('ZREM', AWAY, id) end
    end
  end

  -- Process a due timer of an instance. kind: the letter in front of the instance's id in `due`; see pool.lua.
  function self.timer(kind, id)
    local r = self.read(id)
    if not r then return end
    if kind == 'H' and not r.flags.removed then
      self.set(r, 'heartbeat_missed', true)
      self.add_event('heartbeat_missed', id)
    elseif kind == 'E' and r.flags.ejected then
      local extra = self.extra(r)
      self.set(r, 'ejected', false)
      self.set(r, 'half_open', true)
      extra.probe_since_us, extra.leases_before = after_last_grant_us(r), r.load
      self.add_event('half_open', id)
    elseif kind == 'C' and r.flags.resting then
      self.rest(r, 0)
      self.add_event('rested', id)
    elseif kind == 'V' and r.flags.warming then
      local extra = self.extra(r)
      extra.warm_tenths = extra.warm_tenths + 1
      if extra.warm_tenths >= TENTHS then
        self.set(r, 'warming', false)
        self.add_event('warm', id)
      else
        schedule_step(r)
      end
    elseif kind == 'R' then
      self.limit_rate(r)
    end
    self.store(r)
  end
end
