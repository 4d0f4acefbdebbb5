-- acquire_many: lease several units at once, at most one unit per token.
-- KEYS
--   state      HASH  agentperf:{lb:<type>}:state
--   ready      ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due        ZSET  agentperf:{lb:<type>}:due
--   waitq      ZSET  agentperf:{lb:<type>}:waitq
--   ids        ZSET  agentperf:{lb:<type>}:ids
--   ring       ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   ttl_ms     int   TTL of each lease, ms
--   late       int   1 when another copy of this request may still arrive, else 0
--   wanted     text  strategy the pool must have, or '-' for any
--   labels     text  comma-separated labels; each instance must have all of them; '-' for none
--   point      text  position on the ring, 0 to 2^48 - 1: a hash of the affinity; '-': a random position for each lease
--   randoms    text  random numbers, 0 to 2^52 - 1, one for each lease, separated by spaces
--   tokens     int   expected number of LLM tokens that the work on one lease uses; counts against the instance's
--                    tokens per minute
--   whole      int   1 to lease all units or none, 0 to lease as many as are free
--   leases...  text  '@' followed by the client's token; one for each lease, at most 500
-- RETURNS
--   {1, load, cap, token, id, expiry_ms, fence, record, token ...}   the leases granted to these tokens, now or before.
--     load, cap: as in acquire
--   {0, retry_ms, registered, waiting, disabled, unhealthy, rate_limited}   no lease is granted. Values: as in acquire
--   {-1, why}   all tokens are spent, or whole is 1 and at least one token is spent. No lease is granted. why: as in
--     acquire. Leases that an earlier copy of the request got are kept until they are released or expire
--   {-2, strategy}                       the pool has another strategy
--   {-3, fact}  {-4, field}  {-7, strategy}   as in records.lua
-- REPEAT  returns the same leases, and never leases a second unit to a token. If late is 1 and the pool exists, a call
--         that returns {1, ...} or {0, ...} leaves a tombstone for each token without a lease. So a late copy of the
--         request gets no leases for these tokens
-- ERRORS  none
-- COST    O(n log N + n log L) for n leases to grant, N instances, and L leases in the pool. It calls some 25 + 8 n
--         commands. For each lease, it calls 1 or 2 more for each label of the instance, and 1 more if the instance has
--         rate limits. If whole is 1, it calls up to n more to find all units, or up to N more with several labels. It
--         processes at most 512 due timers, with some 8 commands for each
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local TTL_MS, LATE, WANTED, LABELS, POINT = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local RANDOMS, TOKENS, WHOLE, LEASES = ARGV[6], ARGV[7], ARGV[8], 9
--@include strategies
--@include whole_number
--@include records
--@include grants
--@include totals
--@include pool
--@include pick
--@include repeats
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance
--@include refusals

local EXPIRIES, ROUNDS, PAGE = 64, 8, 64
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = floor(now_us / 1000)
local names, randoms = {}, {}
for i = LEASES, #ARGV do names[#names + 1] = ARGV[i] end
for number in string.gmatch(RANDOMS, '%d+') do randoms[#randoms + 1] = number end

local fact, known = call('HGET', STATE, '#pool'), call('HMGET', STATE, unpack(names))
local fresh, reply, spent = {}, {DONE}, nil
for _, late in ipairs({'0', LATE}) do  -- the first round writes nothing; it only looks for corrupt records
  fresh, reply = {}, {DONE}
  for i, name in ipairs(names) do
    local one = known[i] and repeated(name, known[i], late, TTL_MS, now_ms)
    if not one then
      fresh[#fresh + 1] = name
    elseif one[1] == DONE then
      if not read_record(one[5]) then return corrupt(one[2]) end
      reply[#reply + 1] = name
      for part = 2, 5 do reply[#reply + 1] = one[part] end
    elseif one[1] == SPENT then
      spent = one
    else
      return one
    end
  end
end
if spent and (WHOLE == '1' or #fresh == 0 and #reply == 1) then return spent end
local function granted_reply()
  local load, cap = sums()
  table.insert(reply, 2, cap)
  table.insert(reply, 2, load)
  return reply
end
if #fresh == 0 then return granted_reply() end
local refused, strategy, _, how = opened(fact)
if refused then return refused end
if WANTED ~= '-' and WANTED ~= strategy then
  if not rules(POOL .. WANTED) then return {UNKNOWN_STRATEGY, WANTED} end
  if call('ZCARD', IDS) > 0 then return {OTHER_STRATEGY, strategy} end
end
if not strategy then return {NOTHING, 1000, 0, 0, 0, 0, 0} end
local pool = maintenance(now_us)
if pool.invalid then return corrupt(pool.invalid) end
call('ZCARD', IDS)
call('ZCARD', RING)
if LABELS ~= '-' then check_types(LABELS) end

local several = string.find(LABELS, ',', 1, true)
local from = (LABELS == '-' or several) and READY or READY .. '@' .. LABELS
local suits = several and function(record) return has_all(field(record, 'labels') or '', LABELS) end
local read = {}
-- Read each record only once per round of the loop below. In a round, after `pool.maintain`, only `pool.grant` changes
-- records. It also changes the copies of the records in `read`.
local function instance(id)
  read[id] = read[id] or pool.read(id)
  return read[id]
end

-- Return the ids of instances whose free units add up to at least `count`; nil if there are too few units.
local function reserve(count)
  local found, units = {}, 0
  for at = 0, call('ZCARD', from), PAGE do
    for _, id in ipairs(call('ZRANGE', from, at, at + PAGE - 1)) do
      local r = instance(id)
      if r and (not several or has_all(r.labels, LABELS)) then
        found[#found + 1] = id
        units = units + pool.units(r, count - units, tonumber(TOKENS))
        if units >= count then return found end
      end
    end
  end
end

local expiry_ms, sum, cap = now_ms + TTL_MS, 0, 0
-- Pick an instance with a free unit for one lease. Return the record and the id of the instance. The random number for
-- this lease is `randoms[number]`. If no instance is picked, or if the picked one is full or has a corrupt record, try
-- the ids in `spare`, which `reserve` found. If all of them are full too, return nil and the id of the picked instance,
-- if any.
local function picked(number, spare)
  local random = randoms[number] or '0'
  local point = POINT == '-' and format('%.0f', random % 281474976710656) or POINT
  local id
  if not several or how == 'ring' then id = pick(how, from, random, point, now_ms, sum, cap, suits) end
  if several and not id then id = pool.best(LABELS) end
  local r = id and instance(id)
  if r and r.load < r.limit then return r, id end
  for _, other in ipairs(spare) do
    r = instance(other)
    if r.load < r.limit then return r, other end
  end
  return nil, id
end

for _ = 1, ROUNDS do
  local expired, dispatched = pool.maintain(EXPIRIES)
  read = {}
  local spare = dispatched and (WHOLE == '0' and {} or reserve(#fresh))
  if spare then
    local facts = call('HMGET', STATE, '#load', '#cap')
    sum, cap = whole_sum(facts[1] or '0') or 0, whole_sum(facts[2] or '0') or 0
    while fresh[1] do
      local r, id = picked(#fresh, spare)
      -- A corrupt record is reported only if this call has written nothing. Otherwise a later call reports it.
      if id and not r and not instance(id) and not pool.changed then return corrupt(id) end
      if not r then break end
      local name = table.remove(fresh)
      local fence, text = pool.grant(r, name, expiry_ms, write_lease, LATE, tonumber(TOKENS))
      sum = sum + 1
      for _, part in ipairs({name, r.id, expiry_ms, fence, text}) do reply[#reply + 1] = part end
    end
  end
  if #fresh == 0 or expired < EXPIRIES then break end
end
if LATE == '1' then
  for _, name in ipairs(fresh) do pool.tombstone(name, 'refused') end
end
pool.reschedule()
if #reply > 1 then return granted_reply() end
return refusal_reply(pool, IDS, now_us)
