-- finish_notice: remove a notification that was delivered, or schedule its next attempt.
-- KEYS
--   notices    HASH  agentperf:{alerts}:notices
--   outbox     ZSET  agentperf:{alerts}:outbox:<address>
--   receivers  HASH  agentperf:{alerts}:receivers
-- ARGV
--   address    text  percent-encoded
--   id         text  id of the notification
--   retry_ms   int   time until the next attempt, ms; 0: the notification was delivered
--   keep_ms    int   max age of a notification, ms; an older notification is dropped after a failed attempt
--   error      text  why the attempt failed, percent-encoded; empty if it did not fail
-- RETURNS
--   1   recorded
--   0   the notification is no longer there: it was delivered or dropped, or its address was removed
-- REPEAT  if the first call removed the notification, a second call returns 0. Otherwise the second call counts one
--         more failed attempt
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a text that this library did not write; nothing was changed
-- COST    O(log N) for N waiting notifications of the address
--@include corrupt
--@include whole_number
--@include alerts
local NOTICES, OUTBOX, RECEIVERS = KEYS[1], KEYS[2], KEYS[3]
local ADDRESS, ID, RETRY_MS, KEEP_MS, ERROR = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

local wrong = of_other_type(NOTICES, 'hash') or of_other_type(OUTBOX, 'zset') or of_other_type(RECEIVERS, 'hash')
if wrong then return wrong end
local field = ADDRESS .. '|' .. ID
local text, stored = call('HGET', NOTICES, field), call('HGET', RECEIVERS, ADDRESS)
if not text or not stored then return 0 end
local notice, of = read_notice(text), read_address(stored)
if not notice then return corrupt(NOTICES, 'a notification that this library did not write') end
if not of then return corrupt(RECEIVERS, 'a state that this library did not write') end
local now = clock_ms()
local too_old = now - notice.made > KEEP_MS
if RETRY_MS == 0 or too_old then
  call('ZREM', OUTBOX, ID)
  call('HDEL', NOTICES, field)
else
  call('ZADD', OUTBOX, format('%.0f', now + RETRY_MS), ID)
  call('HSET', NOTICES, field, 'attempts=' .. format('%.0f', notice.attempts + 1) .. ' made=' ..
    format('%.0f', notice.made) .. ' ' .. notice.payload)
end
if RETRY_MS == 0 then of.attempts, of.failed, of.error = 0, 0, ''
else
  of.attempts, of.failed, of.error = of.attempts + 1, now, ERROR
  if too_old then of.dropped = of.dropped + 1 end
end
call('HSET', RECEIVERS, ADDRESS, write_address(of))
return 1
