-- The contents of the keys of a lock or semaphore, and the functions that the scripts share. A lock has one unit, a
-- semaphore may have several. Needs corrupt.lua and whole_number.lua. A script that includes this file must name its
-- keys STATE, HELD and QUEUE.
--
-- All keys of a lock begin with the same <tag>, agentperf:{lock:<name>} or agentperf:{semaphore:<name>}. The keys
-- state, held and queue expire with the last lease, grant or waiter. If a script ends the last lease, grant or waiter,
-- it deletes these three keys.
--   <tag>:state  HASH
--     @<token>   the state of a request; one of
--       held fence= ttl_ms= [late=1] [added=]     late: another copy of the acquire request may still arrive;
--                                                 added: identifies the last addition of time, see extend.lua
--       grant fence= ticket= [late=1]             granted to a waiter that has not fetched the grant yet
--       waiting ticket= limit= live_ms= [late=1]  live_ms: server time at which the waiter loses its position unless it
--                                                 polls again
--     #fence     the last fencing token: the higher of the time of the grant, us, and the previous token + 1
--   <tag>:held   ZSET    @<token> -> when the lease or grant expires, ms
--   <tag>:queue  ZSET    @<token> -> ticket: time of arrival, us. Grants are published on the channel <tag>:queue
--   <tag>:spent:@<token>  STRING  a tombstone, which expires; its text is the reason why a late copy of the
--                                 request is refused
-- Each request contains its own limit, so the lock stores none. A request is granted only if the number of held units
-- is below the limit of the request. The queue is first in, first out. If the first waiter is blocked by its limit, all
-- later waiters wait too, even those with a higher limit.
local call, match, format, floor = redis.call, string.match, string.format, math.floor

local LATE_MS = 55000  -- TTL of a tombstone if another copy of the acquire request may still arrive
local HELD_RECORD = '^held fence=(%d+) ttl_ms=(%d+) ?(l?)'
local GRANTED = '^grant fence=(%d+) ticket=(%d+) ?(l?)'
local WAITING = '^waiting ticket=(%d+) limit=(%d+) live_ms=(%d+) ?(l?)'

local ADDED_LAST = ' added=(%d+)$'

local function write_held(fence, ttl_ms, late, added)
  return 'held fence=' .. fence .. ' ttl_ms=' .. ttl_ms .. (late and ' late=1' or '')
    .. (added and ' added=' .. added or '')
end
-- Return whether another copy of the recorded request may still arrive.
local function is_late(record)
  local _, _, late = match(record, HELD_RECORD)
  if not late then _, _, late = match(record, GRANTED) end
  if not late then _, _, _, late = match(record, WAITING) end
  return late == 'l'
end
local function spent_key(token) return string.sub(STATE, 1, -6) .. 'spent:' .. token end

-- Return the lock as an object. If #fence is not a fencing token, return nil and the error reply. If a key has a wrong
-- type, this function raises an error, so scripts call it before their first write.
local function open_lock(last_fence)
  local CLAIM_MS, EXPIRIES, GRANTS, LIVE_MS, MAX_MS = 3000, 16, 64, 3000, 86400000
  local clock = call('TIME')
  local now_us = clock[1] * 1000000 + clock[2]
  local now_ms = floor(now_us / 1000)
  local last = whole_number(last_fence, 0)
  if not last then return nil, corrupt(STATE, 'a value that this library did not write in the field #fence') end
  call('ZCARD', HELD)
  call('ZCARD', QUEUE)
  local self = {now_us = now_us, now_ms = now_ms}

  -- Take a unit for the request with this token. Returns the fencing token of the unit.
  function self.take(token, for_ms, record)
    last = math.max(now_us, last + 1)
    local fence = format('%d', last)
    call('ZADD', HELD, format('%d', now_ms + for_ms), token)
    call('HSET', STATE, token, record(fence), '#fence', fence)
    return last
  end

  -- Delete leases and grants that have expired.
  function self.expire()
    local names = call('ZRANGEBYSCORE', HELD, '-inf', format('%d', now_ms), 'LIMIT', 0, EXPIRIES)
    for _, token in ipairs(names) do self.drop(token) end
  end

  function self.drop(token)
    call('ZREM', HELD, token)
    call('ZREM', QUEUE, token)
    call('HDEL', STATE, token)
  end

  -- If the server's clock is set back by an hour, the existing leases and grants last an hour too long, even those of
  -- dead processes. To prevent this, check the leases and grants with the earliest expiries. If one has more time left
  -- than its TTL plus STEP_MS, set its time left to its TTL.
  function self.correct()
    local STEP_MS = 1000
    local first = call('ZRANGE', HELD, 0, EXPIRIES - 1, 'WITHSCORES')
    for i = 1, #first, 2 do
      local record = call('HGET', STATE, first[i]) or ''
      local _, ttl_ms = match(record, HELD_RECORD)
      ttl_ms = ttl_ms and whole_number(ttl_ms) or CLAIM_MS
      if first[i + 1] - now_ms <= ttl_ms + STEP_MS then return end
      call('ZADD', HELD, format('%d', now_ms + ttl_ms), first[i])
    end
  end

  -- Grant free units to waiters in the order of the queue, and remove waiters that have stopped polling.
  function self.dispatch()
    for _ = 1, GRANTS do
      local token = call('ZRANGE', QUEUE, 0, 0)[1]
      if not token then return end
      local record = call('HGET', STATE, token) or ''
      local ticket, limit, live_ms = match(record, WAITING)
      live_ms, limit = live_ms and whole_number(live_ms), limit and whole_number(limit)
      if not limit or not live_ms or live_ms <= now_ms then
        call('ZREM', QUEUE, token)
        if ticket then call('HDEL', STATE, token) end
      elseif call('ZCARD', HELD) >= limit then
        return
      else
        call('ZREM', QUEUE, token)
        local late = is_late(record) and ' late=1' or ''
        self.take(token, CLAIM_MS, function(fence) return 'grant fence=' .. fence .. ' ticket=' .. ticket .. late end)
        call('SPUBLISH', QUEUE, token)
      end
    end
  end

  -- Return the milliseconds until the first lease or grant expires, at most 1000.
  function self.retry_ms()
    local first = call('ZRANGE', HELD, 0, 0, 'WITHSCORES')[2]
    return first and math.max(0, math.min(1000, first - now_ms)) or 1000
  end

  -- Let the keys expire with the last lease, grant or waiter.
  function self.keep()
    local last_ms = tonumber(call('ZRANGE', HELD, -1, -1, 'WITHSCORES')[2] or 0) - now_ms
    if call('ZCARD', QUEUE) > 0 then last_ms = math.max(last_ms, LIVE_MS) end
    if last_ms <= 0 then
      call('UNLINK', STATE, HELD, QUEUE)
      return
    end
    local keep_ms = format('%d', math.min(last_ms, MAX_MS))
    for _, key in ipairs({STATE, HELD, QUEUE}) do call('PEXPIRE', key, keep_ms) end
  end

  return self
end
