-- The pool: what its keys hold, and what every script needs of it. With health.lua and maintenance.lua, this is the only code
-- that writes its indexes (ready, ready@<label>, due, waitq, away) and its events.
-- A script that includes these has named its KEYS STATE, READY, DUE and WAITQ.
--
--   state HASH  the truth. Fields are told apart by their first character:
--     <id>      instance: load lim seq fence peak weight labels | flags cap ewma_us ewma_ms served failed fails
--               lim: units that may be leased now, 0 while it takes no work, so that ready <=> load < lim
--               seq: #picks at its last pick    fence: its last fencing number    fails: bad outcomes in a row
--               flags: - or letters. Taken out:  s silent (heartbeat missed)  u unhealthy  d draining  r removed
--                 Judged unfit:  e ejected for its outcomes  c failing its checks  h half-open: on probation
--                 Limited:  a to a limit that was learnt  w while it warms up  l by rates  p none of its rate is left
--     +<id>     what few instances have: ejects until_ms since_us old limit cut_us warm checks checked_ms rpm tpm rpm_us tpm_us [beat_ms]
--               ejects: ejections in a row   until_ms: end of the last one   since_us: leases from then on are on probation
--               old: leases from before that, while it is half-open   limit: learnt, in 1/1000, decimal   cut_us: when it was lowered
--               warm: tenths of its capacity while it warms up   checks: passed in a row, failed ones below 0   checked_ms: when the last was taken on
--               rpm tpm: requests and tokens a minute, 0 for no limit   rpm_us tpm_us: their theoretical arrival times
--               beat_ms: missing heartbeats this long make it silent, as it was registered; only where they are expected
--     @<token>  lease "L <id> <fence> <late>", late 1 when a copy of its request may still be under way
--               grant, not fetched yet "G <id> <fence> <score>" | in line "W <score> <ttl_ms> <labels> <tokens>"
--               tombstone "X <why>": r released  e expired  u not fetched  c cancelled
--     #pool     "<schema> <strategy>", and when slow outcomes count, " <slow_us>"
--     #settings eject_after eject_ms eject_most_ms eject_share panic_share slow_us adaptive ramp_ms burst_ms fall rise
--               shares in 1/1000
--     #born     when it was founded, us    #picks  leases granted so far    #load #cap  sums over the instances
--     #usable #out   instances that are not taken out, and of these those judged unfit    #panic  since when, ms
--     #warming  those that are usable and fit, but not warm yet    #calm  when there was panic last, ms
--     #next     when the pool needs a look, ms: a lower bound of due; 0 while somebody waits
--   ready  ZSET   <id> -> score by strategy; ready@<label>, computed here under the same tag, likewise
--   due    ZSET   @<token> lease or grant ends | W@<token> waiter fell silent | X@<token> tombstone goes -> ms
--                 H:<id> heartbeat | E:<id> ejection ends | R:<id> rate comes back | V:<id> warms up | P:<cursor> panic turns
--   waitq  ZSET   @<token> -> arrival, us, less its priority; its name is also the channel on which grants are announced
--   away   ZSET   <id> -> when it comes back, ms, 0 when that is not known: usable, and unfit or without rate; computed
--   events STREAM kind, id and what else there is to say; the last EVENTS or so; computed
-- Scripts that run at every call write whole numbers with '%d', at half the cost of '%.0f': Lua 5.1 makes a long of them, which
-- has 64 bits, and none of ours passes 2^53.
local call, match, format, floor = redis.call, string.match, string.format, math.floor
local SCHEMA, POOL = '1', '^1 (%S+) ?(%d*)$'
local RECORD = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+%.?%d*) (%S+) (%S+ %d+ %d+ %d+ %d+ %d+ %d+)$'
local LEASED = '^(%d+) (%d+) %d+ (%d+) (%d+) (%d+%.?%d* (%S+) (%S+) %d+ %d+ %d+ %d+ %d+ %d+)$'  -- what a grant needs of a RECORD
local RETURNED = '^(%d+) ((%d+) (%d+) %d+ %d+ (%d+%.?%d*) (%S+) (%S+) %d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'  -- and what its end does
local REST = '^(%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local MORE, MORE_REST = '^(%d+) (%d+) (%d+) (%d+) (%d+%.?%d*) (%d+) (.*)$', '^(%d+) (%-?%d+) (%d+) (%d+%.?%d*) (%d+%.?%d*) (%d+) (%d+) ?(%d*)$'
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
      score = format('%d', weight * 1e9 * (lim - load) / lim)
    elseif strategy ~= 'random' and strategy ~= 'peak_ewma' then
      score = format('%d', floor(load * 8192 / lim) * 1099511627776 + seq)
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

-- Whether labels, as a record has them, include all of others.
local function has_all(labels, others)
  for label in string.gmatch(others, '[^,]+') do
    if not string.find(',' .. labels .. ',', ',' .. label .. ',', 1, true) then return false end
  end
  return true
end
