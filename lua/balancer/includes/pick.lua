-- How each strategy picks from the ready instances, in O(log N). Needs `call`, `match`, `format`, `floor` and the keys
-- STATE and RING.
--
-- pick(how, from, random, point, now_ms, load, cap, suits) returns the id of an instance, and also its record if the
-- pick has read it. Returns nil if there is no suitable instance.
--   how     the strategy's pick, as in strategies.lua
--   from    the index to pick from: ready, or ready@<label>
--   random  a random integer below 2^52 from the caller, used as two numbers of 26 bits
--   point   the position on the ring, 0 to 2^48 - 1: a hash of the affinity that the caller gave, or random
--   load    sum of the loads in the pool; `ring` uses it to bound the load of the picked instance
--   cap     sum of the capacities in the pool; `ring` uses it for the same bound
--   suits   for `ring` only: a function that gets the record of an instance and returns whether the instance is
--           suitable. Without a function (nil or false), all instances of `from` are suitable
local function pick(how, from, random, point, now_ms, load, cap, suits)
  if how == 'first' then return call('ZRANGE', from, '0', '0')[1] end
  local n = how == 'ring' and 1 or call('ZCARD', from)  -- `ring` rarely needs the number of ready instances
  if n == 0 then return nil end
  local u1, u2 = random % 67108864 / 67108864, floor(random / 67108864) / 67108864
  -- Under lower_of_two, `from` is sorted by load. So the lower of two random ranks belongs to the less loaded of two
  -- random instances.
  local rank = format('%d', (how == 'lower_of_two' and math.min(u1, u2) or u1) * n)
  if how == 'any' or how == 'lower_of_two' then return call('ZRANGE', from, rank, rank)[1] end

  -- Draw an instance with a probability proportional to its score, by rejection sampling. The probabilities are exact
  -- with any upper bound on the scores, but a higher bound causes more rejections. The first 6 draws use the highest
  -- score as the bound. If all of them are rejected, the instances are divided into at most 16 classes by their scores.
  -- A class is a range of ranks in `from` and has its own bound. Each further draw first takes a class, then an
  -- instance of the class. The scores in a class differ by at most a factor of 4, except in the class of the lowest
  -- scores. The rank and the acceptance of a draw use two separate random generators (Park and Miller). With a single
  -- generator, a pool of several thousand instances would show a bias. When all scores are 0, all instances are equally
  -- likely.
  if how == 'proportional' then
    local M = 2147483647
    local x, y = floor(u1 * (M - 1)) + 1, floor(u2 * (M - 1)) + 1
    local high = tonumber(call('ZRANGE', from, '-1', '-1', 'WITHSCORES')[2])
    for _ = 1, 6 do
      local one = call('ZRANGE', from, rank, rank, 'WITHSCORES')
      y = y * 16807 % M
      if y * high <= one[2] * M then return one[1] end
      x = x * 48271 % M
      rank = format('%d', x / M * n)
    end
    local classes, total, left = {}, 0, n
    for k = 1, 16 do
      local under = k < 16 and floor(high / 4) or -1
      local count = under < 0 and left or call('ZCOUNT', from, '(' .. format('%.0f', under), format('%.0f', high))
      left = left - count
      if count > 0 then classes[#classes + 1] = {first = left, count = count, high = high} end
      total, high = total + count * high, under
      if left == 0 then break end
    end
    local id
    for _ = 1, 64 do
      x = x * 48271 % M
      local at, k = x / M * total, 1
      while k < #classes and at >= classes[k].count * classes[k].high do
        at, k = at - classes[k].count * classes[k].high, k + 1
      end
      local class = classes[k]
      x = x * 48271 % M
      rank = class.first + floor(x / M * class.count)
      local one = call('ZRANGE', from, rank, rank, 'WITHSCORES')
      y = y * 16807 % M
      id = one[1]
      if y * class.high <= one[2] * M then break end
    end
    return id
  end

  -- Peak EWMA: return the cheaper of two random instances. The price of an instance is (load + 1) times its latency.
  -- This latency decays with the time since it was measured. A busy instance whose latency was never measured is
  -- expensive, as in Finagle.
  if how == 'cheaper_of_two' then
    local other = format('%d', u2 * n)
    local one = call('ZRANGE', from, rank, rank)[1]
    other = call('ZRANGE', from, other, other)[1]
    local PRICED = '^load=(%d+) limit=%S+ %S+ %S+ %S+ ewma_us=(%d+) ewma_at_ms=(%d+) '
    local best, lowest, its
    for i, record in ipairs(call('HMGET', STATE, one, other)) do
      local load, ewma_us, ewma_at_ms = match(record or '', PRICED)
      if load then
        local price = load == '0' and 0 or 1e15 + load
        local age_ms = now_ms - ewma_at_ms
        if age_ms < 0 then age_ms = 0 end  -- the server's clock was set back
        if ewma_us ~= '0' then price = ewma_us * math.exp(age_ms / -10000) * (load + 1) end
        if not lowest or price < lowest then best, lowest, its = i == 1 and one or other, price, record end
      end
    end
    return best or one, its  -- if neither record matches, the caller checks the record of `one`
  end

  -- Look at up to 32 points of the ring, clockwise from `point`. Return the first suitable instance that is in `from`
  -- and whose load is below `share` times its limit. If there is no such instance: with `suits`, return nil; without
  -- `suits`, return the least loaded instance of `from`. Usually one of the first FEW points has such an instance, so
  -- these points are read first. An instance whose record does not begin with load and limit is skipped until a script
  -- has rewritten the record in the usual order.
  local share = 1.25 * ((load or 0) + 1) / math.max(1, cap or 1)
  local FEW, POINTS, LOADED = '4', '28', '^load=(%d+) limit=(%d+) '
  for round = 1, 2 do
    local first, count = '0', FEW
    if round == 2 then
      if call('ZCARD', from) == 0 then return nil end  -- no instance of the index has free capacity
      first, count = FEW, POINTS
    end
    local names = call('ZRANGEBYSCORE', RING, point, '+inf', 'LIMIT', first, count)
    local missing = count - #names
    if missing > 0 then
      -- At the end of the ring, continue at its beginning. Looking at a point twice is harmless.
      for _, name in ipairs(call('ZRANGE', RING, 0, missing - 1)) do names[#names + 1] = name end
    end
    for i = 1, #names do
      local id = match(names[i], '^[^#]*')
      local record = call('HGET', STATE, id)
      local load, limit = match(record or '', LOADED)
      load, limit = tonumber(load), tonumber(limit)
      if load and load < limit and load < share * limit and call('ZSCORE', from, id)
        and (not suits or suits(record)) then
        return id, record
      end
    end
  end
  return not suits and call('ZRANGE', from, '0', '0')[1] or nil
end
