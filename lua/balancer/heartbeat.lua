-- heartbeat: record that instances are alive. An instance that was disabled by a missed heartbeat takes work again.
-- KEYS
--   state       HASH  agentperf:{lb:<type>}:state
--   ready       ZSET  agentperf:{lb:<type>}:ready; the names of the pool's other keys are derived from it
--   due         ZSET  agentperf:{lb:<type>}:due
--   waitq       ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   silence_ms  int   time until the next heartbeat is due, ms; 0: the silence_ms with which the instance was
--                     registered, or 30 s if it was registered with 0
--   names...    text  ids of instances, at most 500
-- RETURNS
--   {1, id...}   the instances that are not registered. The heartbeats of all others were recorded
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(k log L) for k instances and L timers. It also grants units to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SILENCE_MS = ARGV[1]
--@include strategies
--@include whole_number
--@include records
--@include pool
--@include field
--@include whole_records
--@include labels
--@include health
--@include maintenance

local DEFAULT_MS = 30000
local fact = call('HGET', STATE, '#pool')
local refused = opened(fact)
if refused then return refused end
local pool = maintenance()
if pool.invalid then return corrupt(pool.invalid) end
local reply, revived = {DONE}, false
local names, alive, extras = {}, {}, {}
for i = 2, #ARGV do names[i - 1], alive[i - 1], extras[i - 1] = 'H:' .. ARGV[i], ARGV[i], '+' .. ARGV[i] end
local ends = call('ZMSCORE', DUE, unpack(names))
local records = SILENCE_MS == '0' and call('HMGET', STATE, unpack(extras)) or {}
local function silence_ms(i)
  return SILENCE_MS ~= '0' and SILENCE_MS or whole_number(field(records[i] or '', 'heartbeat_ms'), DEFAULT_MS)
end
for i = 1, #names do
  if not silence_ms(i) then return corrupt(extras[i]) end
end
local function due_ms(i) return format('%.0f', pool.now_ms + silence_ms(i)) end
local late = {}
for i in ipairs(names) do
  if not ends[i] or tonumber(ends[i]) <= pool.now_ms then late[#late + 1] = alive[i] end
end
local corrupt_id = pool.first_corrupt(late)
if corrupt_id then return corrupt(corrupt_id) end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
for i, name in ipairs(names) do
  if ends[i] and tonumber(ends[i]) > pool.now_ms then
    call('ZADD', DUE, due_ms(i), name)
  else
    local r = pool.read(alive[i])
    if not r or r.flags.removed then
      reply[#reply + 1] = alive[i]
    else
      call('ZADD', DUE, due_ms(i), name)
      if r.flags.heartbeat_missed then pool.add_event('heartbeat_resumed', alive[i]) end
      pool.set(r, 'heartbeat_missed', false)
      pool.store(r)
      revived = true
    end
  end
end
if revived then pool.dispatch() end
pool.reschedule()
return reply
