-- The reply to a repeated request for a lease. Needs records.lua, grants.lua and totals.lua; pool.lua describes the
-- records.

-- Return the reply to a request whose token already has a record: the lease of the token, or the reason why the token
-- is spent. If another copy of the request may still arrive (late is '1'), note this in the record of the lease.
local function repeated(token, text, late, ttl_ms, now_ms)
  local instance, fence, was_late = match(text, LEASE)
  if not instance then return {SPENT, match(text, TOMBSTONE) or match(text, '^%S*')} end
  fence = tonumber(fence)
  if fence > 9e15 then return corrupt(token) end
  local expiry_ms = tonumber(call('ZSCORE', DUE, token) or 0)
  if expiry_ms <= now_ms then return {SPENT, 'expired'} end
  local record = call('HGET', STATE, instance) or ''
  if late == '1' and was_late == '' and match(record, GRANT) then
    call('HSET', STATE, token, write_lease(instance, format('%d', fence), '1', ttl_ms))
  end
  return {DONE, instance, math.min(expiry_ms, now_ms + ttl_ms), fence, record, sums()}
end
