-- heartbeat: say that instances are alive; one that was silent comes back.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label>, away and events are computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
-- ARGV
--   silence_ms  int   the next heartbeat is due within, ms; 0: within what each was registered with, or 30 s
--   names...    text  instances, at most 500
-- RETURNS
--   {1, id...}   done, but for these: not registered
--   {-3, fact}  {-4, field}   other schema; a field we did not write
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(k log L), and the hand-offs to at most 16 waiters
local STATE, READY, DUE, WAITQ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SILENCE_MS = tonumber(ARGV[1])
--@include pool
--@include health
--@include maintenance

local DEFAULT_MS = 30000
local pool = call('HGET', STATE, '#pool')
if pool and not match(pool, POOL) then return {OTHER_SCHEMA, pool} end
local wrong = odd()
if wrong then return {CORRUPT, wrong} end
local all = upkeep()
local reply, revived = {DONE}, false
local names, alive, more = {}, {}, {}
for i = 2, #ARGV do names[i - 1], alive[i - 1], more[i - 1] = 'H:' .. ARGV[i], ARGV[i], '+' .. ARGV[i] end
local ends = call('ZMSCORE', DUE, unpack(names))
local others = SILENCE_MS == 0 and call('HMGET', STATE, unpack(more)) or {}
local function till(i)
  local silence_ms = SILENCE_MS
  if silence_ms == 0 then
    silence_ms = tonumber((select(8, match(select(7, match(others[i] or '', MORE)) or '', MORE_REST))))
  end
  return format('%.0f', all.now_ms + (silence_ms or DEFAULT_MS))
end
call('ZREM', DUE, '')  -- removes nothing: a first write that is allowed at maxmemory makes the others allowed
for i, name in ipairs(names) do
  if ends[i] and tonumber(ends[i]) > all.now_ms then
    call('ZADD', DUE, till(i), name)
  else
    local r = all.read(alive[i])
    if not r or all.has(r, 'r') then
      reply[#reply + 1] = alive[i]
    else
      call('ZADD', DUE, till(i), name)
      if all.has(r, 's') then all.tell('heard', alive[i]) end
      all.set(r, 's', false)
      all.store(r)
      revived = true
    end
  end
end
if revived then all.pump() end
all.retime()
return reply
