-- extend: give a lease a new TTL, counted from now. Later renewals by the client use the new TTL.
-- KEYS
--   state   HASH  agentperf:{lb:<type>}:state
--   due     ZSET  agentperf:{lb:<type>}:due
-- ARGV
--   token   text  '@' followed by the lease's token
--   ttl_ms  int   TTL from now, ms; it may be shorter than the time that is left
-- RETURNS
--   1   extended
--   0   there is no such lease: it has expired, was released, or was never granted
--   {-3, fact}  {-4, field}   as in records.lua
-- REPEAT  the TTL counts from the last copy of the request, so each further copy lets the lease end later
-- ERRORS  none
-- COST    O(log L) for L leases
local STATE, DUE = KEYS[1], KEYS[2]
local TOKEN, TTL_MS = ARGV[1], ARGV[2]
--@include strategies
--@include whole_number
--@include records
--@include grants

local facts = call('HMGET', STATE, TOKEN, '#next', '#pool')
local expiry_ms = tonumber(call('ZSCORE', DUE, TOKEN) or 0)
local clock = call('TIME')
local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
local refused = opened(facts[3])
if refused then return refused end
local instance, fence, late = match(facts[1] or '', LEASE)
if not instance or expiry_ms <= now_ms then return NOTHING end
if not whole_number(fence) then return corrupt(TOKEN) end
local next_ms = whole_number(facts[2], 0)
if not next_ms then return corrupt('#next') end
call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
call('HSET', STATE, TOKEN, write_lease(instance, fence, late ~= '' and '1' or '0', TTL_MS))
call('ZADD', DUE, format('%d', now_ms + TTL_MS), TOKEN)
if now_ms + TTL_MS < next_ms then call('HSET', STATE, '#next', format('%d', now_ms + TTL_MS)) end
return DONE
