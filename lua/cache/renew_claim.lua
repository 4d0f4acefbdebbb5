-- renew_claim: renew a compute lease while the value is being computed.
-- KEYS
--   lease     HASH  <tag>:l:<key>
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   token     text  token of the lease
--   lease_ms  int   new TTL of the lease, ms
-- RETURNS
--   {1}                 renewed
--   {-1}                the lease was lost
-- REPEAT  a second delivery renews again
-- ERRORS  none
-- COST    O(1)
local LEASE = KEYS[1]
local TOKEN, LEASE_MS = ARGV[1], ARGV[2]

if redis.call('HGET', LEASE, 'token') ~= TOKEN then return {-1} end
redis.call('PEXPIRE', LEASE, LEASE_MS)
return {1}
