-- acquire: pick an instance and lease one unit of its capacity, at most once per token.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   token     text  @ and the client's token
--   ttl_ms    int   life of the lease, ms
--   late      int   1 when another copy of this request may be under way, else 0
--   wanted    text  strategy the pool must have, or - for its own
--   labels    text  a,b the instance must have all of; - for none
--   point     int   of the affinity on the ring, 0 to 2^48 - 1
--   random    int   0 to 2^52 - 1
--   tokens    int   counted against the instance's tokens a minute
-- RETURNS
--   {1, id, expiry_ms, fence, record}    granted, or the same grant again
--   {0, retry_ms, registered, waiting, taken_out, unfit, parked}
--     nothing free; retry_ms: until capacity may come back, at most 1000; when all that is needed is time, until an
--     instance comes back; taken_out: instances that drain, are silent or marked; unfit: by outcomes or checks; parked:
--     out of rate
--   {-1, why}                            the token is spent: r e u c as in pool.lua, or in line: W G
--   {-2, strategy}  {-3, fact}  {-4, field}   other strategy; other schema; a field we did not write
-- REPEAT  returns the same lease; after release (when late), cancellation or expiry it is refused
-- ERRORS  none
-- COST    O(log N + log L), and at most 64 expiries when some are due
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local TOKEN, TTL_MS, LATE, WANTED = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local LABELS, POINT, RANDOM, TOKENS = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
--@include pool
--@include pick

local EXPIRIES, ROUNDS = 8, 8
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = floor(now_us / 1000)
local facts = call('HMGET', STATE, TOKEN, '#pool', '#next', '#picks', '#load', '#cap')

if facts[1] then
  local kind, what, fence, marked = match(facts[1], '^(%a) (%S+) ?(%S*) ?(%S*)')
  if kind ~= 'L' then return {SPENT, kind == 'X' and what or kind or '?'} end
  local expiry_ms = tonumber(call('ZSCORE', DUE, TOKEN) or 0)
  if expiry_ms <= now_ms then return {SPENT, 'e'} end
  if LATE == '1' and marked == '0' then call('HSET', STATE, TOKEN, 'L ' .. what .. ' ' .. fence .. ' 1') end
  return {DONE, what, expiry_ms, tonumber(fence), call('HGET', STATE, what) or ''}
end
if not facts[2] then return {NOTHING, 1000, 0, 0, 0, 0, 0} end
local strategy = match(facts[2], POOL)
if not strategy then return {OTHER_SCHEMA, facts[2]} end
if WANTED ~= strategy and WANTED ~= '-' and call('ZCARD', IDS) > 0 then return {OTHER_STRATEGY, strategy} end
local wrong = odd(facts[3], facts[4], facts[5], facts[6])
if wrong then return {CORRUPT, wrong} end

local id, record
local expiry_ms, next_ms = now_ms + TTL_MS, tonumber(facts[3] or 0)
local look, several = next_ms <= now_ms, string.find(LABELS, ',', 1, true)
local from = (LABELS == '-' or several) and READY or READY .. '@' .. LABELS

-- The usual case in a straight line: nothing is due, nobody waits, the instance has no rates to keep to. What the others need
-- is included below it, so that it costs them alone.
if not look and not several then
  id, record = pick(strategy, from, RANDOM, POINT, now_ms, facts[5], facts[6])
  local load, lim, fence, peak, rest, its, flags = match(id and (record or call('HGET', STATE, id)) or '', LEASED)
  if id and not load then return {CORRUPT, id} end
  load, lim = tonumber(load), tonumber(lim)
  if id and load >= lim then id = nil end
  if id and not string.find(flags, 'l', 1, true) then
    if its ~= '-' then check(its) end
    load, fence = load + 1, fence + 1
    if fence < now_us then fence = now_us end
    if load > tonumber(peak) then peak = load end
    local seq = format('%d', (facts[4] or 0) + 1)
    record = format('%d %d %s %d %s %s', load, lim, seq, fence, peak, rest)
    call('ZADD', DUE, format('%d', expiry_ms), TOKEN)
    call('HSET', STATE, id, record, TOKEN, format('L %s %d %s', id, fence, LATE),
      '#picks', seq, '#load', format('%d', (facts[5] or 0) + 1))
    if expiry_ms < next_ms then call('HSET', STATE, '#next', format('%d', expiry_ms)) end
    index(strategy, id, load, lim, seq, strategy == 'weighted' and match(rest, '^%S+'), its, true)
    return {DONE, id, expiry_ms, fence, record}
  end
end
--@include health
--@include maintenance

-- First whatever is due, then whoever waits: a new caller takes neither's place. Nothing is full while expiries are
-- left to clear.
local all = (look or several or id) and upkeep(now_us)
if look then  -- what is read after the first write has its type checked before it
  call('ZCARD', IDS)
  call('ZCARD', RING)
  if LABELS ~= '-' then check(LABELS) end
end
for _ = 1, (look or several) and ROUNDS or 0 do
  local reaped, open = 0, true
  if look then
    reaped, open = all.tidy(EXPIRIES)
    facts = call('HMGET', STATE, TOKEN, '#pool', '#next', '#picks', '#load', '#cap')
  end
  if open and (not several or strategy == 'consistent_hash') then
    id = pick(strategy, from, RANDOM, POINT, now_ms, facts[5], facts[6], several and LABELS)
  end
  if open and several and not id then id = all.best(LABELS) end
  if id or reaped < EXPIRIES then break end
end
if id then
  local r = all.read(id)
  if not r then return {CORRUPT, id} end
  if r.load < r.lim then
    local fence, text = all.grant(r, TOKEN, expiry_ms, 'L', LATE, tonumber(TOKENS))
    all.retime()
    return {DONE, id, expiry_ms, fence, text}
  end
end

local retry_ms = respite(now_ms)
local away, registered = call('ZCARD', string.sub(READY, 1, -6) .. 'away'), call('ZCARD', IDS)
if away > 0 then retry_ms = (all or upkeep(now_us)).back_after_ms() or retry_ms end
local counts = call('HMGET', STATE, '#usable', '#out')
local usable, out = tonumber(counts[1]) or 0, tonumber(counts[2]) or 0
return {
  NOTHING, retry_ms, registered, call('ZCARD', WAITQ), math.max(0, registered - usable), out, math.max(0, away - out),
}
