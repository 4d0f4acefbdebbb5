-- remove: take an instance out: no new leases; its record goes with its last lease.
-- KEYS
--   state     HASH  agentperf:{lb:<type>}:state
--   ready     ZSET  agentperf:{lb:<type>}:ready; ready@<label> is computed under the same tag
--   due       ZSET  agentperf:{lb:<type>}:due
--   waitq     ZSET  agentperf:{lb:<type>}:waitq
--   ids       ZSET  agentperf:{lb:<type>}:ids
--   ring      ZSET  agentperf:{lb:<type>}:ring
-- ARGV
--   id        text  the instance
-- RETURNS
--   1   done
--   0   no such instance
--   {-3, fact}  {-4, field}   other schema; a field we did not write
-- REPEAT  0, nothing changes
-- ERRORS  none
-- COST    O(log N + log ring)
local state, ready, due, waitq, ids, ring = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id = ARGV[1]
--@include pool

local POINTS = 32
local known = call('HMGET', state, '#pool', id)
call('ZCARD', ring)
if known[1] and not match(known[1], POOL) then return {OTHER_SCHEMA, known[1]} end
if not call('ZSCORE', ids, id) then return NOTHING end
local all = upkeep()
local r = all.read(id)
if known[2] and not r then return {CORRUPT, id} end
call('ZREM', ids, id)
call('ZREM', due, 'H:' .. id)
for n = 1, POINTS do call('ZREM', ring, id .. '#' .. n) end
if r then
  r.flags = 'r'
  all.store(r)
end
all.retime()
return DONE
