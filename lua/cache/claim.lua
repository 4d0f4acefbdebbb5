-- claim: take the compute lease on a missing value, or learn which other caller holds it.
-- KEYS
--   entry     STRING  <tag>:e:<key>
--   lease     HASH    <tag>:l:<key>
--   meta      HASH    <tag>:meta
--   epochs    STRING  <tag>:epochs
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   token     text    random; the token of the lease if the lease is granted
--   lease_ms  int     TTL of the lease unless it is renewed, ms
--   ignore    text    the first 8 characters (the version) of an entry that the caller found invalid; this entry counts
--                     as missing. Empty for none
--   awaited   text    token of the lease that the caller has been waiting for; empty for none
--   retry_ms  text    for a background refresh of a stale value: min time between a failed computation and the next
--                     attempt, ms. Empty for a reader
-- RETURNS
--   {1, entry, epochs}  there is an entry that was not cleared. The caller checks whether one of the entry's tags
--                       was invalidated
--   {2, version, wrong_type}  the lease is granted, and the caller computes the value. version: the clock of the
--                       cache's last change. If the cache is cleared or a tag of the value is invalidated after this
--                       change, put.lua refuses the value. wrong_type: 1 if the key of the entry or of the lease had a
--                       wrong type, else 0. Such a key is replaced
--   {3, lease_left_ms, token}  another caller computes the value. lease_left_ms: remaining TTL of its lease; token:
--                       token of its lease
--   {4, error}          the awaited computation failed, or a background refresh comes less than retry_ms after the last
--                       failed computation. error: "<type> <message>", or a blank if the value cannot be stored
--   {0}                 the entries are being moved to another layout; nothing done
-- REPEAT  a second delivery grants the same lease again while it is held. A late delivery may take a lease that no
--         caller uses; this lease expires
-- ERRORS  CORRUPT if the clock in meta is not a number; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
--@include header
local ENTRY, LEASE, META, EPOCHS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local TOKEN, LEASE_MS, IGNORE, AWAITED, RETRY_MS = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])

local call = redis.call
local stored = call('HMGET', META, 'clock', 'frozen')
if stored[2] then return {0} end
local clock = whole_number(stored[1], 0)
if not clock then return corrupt(META, 'a clock that is no whole number') end
local lease, wrong_type = redis.pcall('HMGET', LEASE, 'token', 'version', 'failed', 'error', 'failed_ms', 'lease_ms'), 0
if lease.err then
  if not string.find(lease.err, 'WRONGTYPE', 1, true) then return lease end
  call('UNLINK', LEASE)
  lease, wrong_type = {}, 1
end
local found = call('MGET', ENTRY, EPOCHS)
if not found[1] and call('EXISTS', ENTRY) == 1 then wrong_type = 1 end
local version = entry_version(found[1])
if version and string.sub(found[1], 1, 8) ~= IGNORE then
  local cleared = string.match(found[2] or '0', '^%d+')
  if cleared and version > tonumber(cleared) then return {1, found[1], found[2] or ''} end
end
if lease[3] and lease[3] == AWAITED then return {4, lease[4] or ''} end
-- A repeated delivery: the lease was granted before. If its stored version is unreadable, the reply has version 0, and
-- put.lua may refuse the value.
if lease[1] == TOKEN then return {2, whole_number(lease[2]) or 0, wrong_type} end
if RETRY_MS and lease[5] and not lease[1] then
  local time = call('TIME')
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  local failed_ms = whole_number(lease[5]) or 0
  -- If failed_ms is in the future, the server's clock was set back after the failure. Such a failure does not count.
  if failed_ms <= now_ms and now_ms < failed_ms + RETRY_MS then return {4, lease[4] or ''} end
end
if lease[1] then
  if not RETRY_MS then call('HSET', LEASE, 'waited', 1) end
  -- If more time is left than the lease_ms of the grant, the server's clock was set back after the grant.
  local left_ms, max_ms = call('PTTL', LEASE), whole_number(lease[6])
  if max_ms and left_ms > max_ms then
    call('PEXPIRE', LEASE, string.format('%d', max_ms))
    left_ms = max_ms
  end
  return {3, math.max(1, left_ms), lease[1]}
end
-- The lease stores `clock`, the version of the last change, instead of the server's time. So a later invalidation has a
-- higher version than the stored one, even if the server's clock was set back in between.
call('HSET', LEASE, 'token', TOKEN, 'version', string.format('%d', clock), 'lease_ms', LEASE_MS)
call('PEXPIRE', LEASE, LEASE_MS)
return {2, clock, wrong_type}
