-- renew: give many leases the same TTL, counted from now. A lease that has more time left than this TTL is shortened,
-- for example after the server's clock was set back.
-- KEYS
--   due        ZSET  agentperf:{lb:<type>}:due
-- ARGV
--   ttl_ms     int   TTL from now, ms
--   tokens...  text  '@' followed by the client's token; one for each lease, at most 500
-- RETURNS
--   {1, token...}   the tokens that could not be renewed: expired, released or never granted
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(k log L) for k tokens and L leases
local DUE = KEYS[1]
local TTL_MS = ARGV[1]
local call = redis.call
local clock = call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local tokens, reply, prolong = {}, {1}, {}
for i = 2, #ARGV do tokens[i - 1] = ARGV[i] end
local till = string.format('%.0f', now_ms + TTL_MS)
for i, expiry_ms in ipairs(call('ZMSCORE', DUE, unpack(tokens))) do
  if expiry_ms and tonumber(expiry_ms) > now_ms then
    prolong[#prolong + 1] = till
    prolong[#prolong + 1] = tokens[i]
  else
    reply[#reply + 1] = tokens[i]
  end
end
if #prolong > 0 then
  call('ZREM', DUE, '')  -- removes nothing; after this write, the server runs the rest of the script even at maxmemory
  call('ZADD', DUE, 'XX', unpack(prolong))
end
return reply
