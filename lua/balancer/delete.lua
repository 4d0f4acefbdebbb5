-- delete: delete a pool with its instances, leases, waiters, settings, events and history.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   until_ms  int   server time after which this request is refused, ms; 0: never
-- RETURNS
--   1              deleted. The creation time of the pool is kept for a minute. With it, a process that registered an
--     instance can distinguish this deletion from a loss of data on the server. Waiters queue again with their next
--     poll, and then wait until an instance is registered
--   0              no such pool
--   {-3, fact}     as in records.lua
--   {-6, now_ms}   the request came after until_ms; nothing was changed
-- REPEAT  returns 0; a copy that arrives after until_ms is refused, since it could delete a newer pool
-- ERRORS  none
-- COST    O(N): it reads the labels of N instances. The server frees the memory in the background
local STATE, READY, DUE, WAITQ, IDS, RING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local UNTIL_MS = ARGV[1]
--@include strategies
--@include records
--@include field

local CHUNK, MARKED_MS = 500, '60000'
local TAG = string.sub(READY, 1, -6)
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
if UNTIL_MS ~= '0' and now_ms > tonumber(UNTIL_MS) then return {TOO_LATE, now_ms} end
local known = call('HMGET', STATE, '#pool', '#settings', '#born')
local registered = call('ZCARD', IDS)
if not known[1] and not known[2] and registered == 0 then return NOTHING end
local refused = opened(known[1])
if refused and refused[1] == -3 then return refused end
local doomed, seen = {STATE, READY, DUE, WAITQ, IDS, RING}, {}
for _, part in ipairs({'away', 'checks', 'events', 'history'}) do doomed[#doomed + 1] = TAG .. part end
for first = 0, registered - 1, CHUNK do
  local some = call('ZRANGE', IDS, first, first + CHUNK - 1)
  for _, record in ipairs(#some > 0 and call('HMGET', STATE, unpack(some)) or {}) do
    local labels = field(record or '', 'labels') or '-'
    for label in string.gmatch(labels == '-' and '' or labels, '[^,]+') do
      if not seen[label] then
        seen[label], doomed[#doomed + 1] = true, READY .. '@' .. label
      end
    end
  end
end
for _, key in ipairs(doomed) do call('UNLINK', key) end
if known[3] then
  call('HSET', STATE, '#born', known[3], '#expires', MARKED_MS)
  call('PEXPIRE', STATE, MARKED_MS)
end
return DONE
