-- claim_notices: for each address, claim the notification that has been due longest. The claim is a lease of lease_ms.
-- KEYS
--   notices       HASH  agentperf:{alerts}:notices
--   receivers     HASH  agentperf:{alerts}:receivers
--   The keys outbox:<address> are computed here, under the same hash tag.
-- ARGV
--   lease_ms      int   time after which another process may claim the notification, ms
--   addresses...  text  percent-encoded
-- RETURNS
--   {1, address, id, attempts, payload, address, id, attempts, payload ...}   attempts: failed attempts so far
--     payload: the text that report.lua stored
-- REPEAT  a second delivery claims other notifications. If a reply is lost, the notifications in it wait until their
--         leases end
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a text that this library did not write; nothing was changed
-- COST    O(addresses log N) for N waiting notifications of an address
--@include corrupt
--@include whole_number
--@include alerts
local NOTICES, RECEIVERS = KEYS[1], KEYS[2]
local LEASE_MS, ADDRESSES = tonumber(ARGV[1]), 2

local MAX_BACKOFF_MS = 3600000  -- if a notification is due further ahead than this, the server's clock was set back
local TAG = string.sub(NOTICES, 1, -8)
for _, key in ipairs({NOTICES, RECEIVERS}) do
  local wrong = of_other_type(key, 'hash')
  if wrong then return wrong end
end
local now = clock_ms()
local found, lost = {}, {}
for i = ADDRESSES, #ARGV do
  local outbox = TAG .. 'outbox:' .. ARGV[i]
  local wrong = of_other_type(outbox, 'zset')
  if wrong then return wrong end
  local first = call('ZRANGE', outbox, 0, 0, 'WITHSCORES')
  local due = first[1] and first[2] + 0
  if due and (due <= now or due > now + MAX_BACKOFF_MS) then
    local text = call('HGET', NOTICES, ARGV[i] .. '|' .. first[1])
    local notice = read_notice(text)
    if text and not notice then return corrupt(NOTICES, 'a notification that this library did not write') end
    if notice then found[#found + 1] = {outbox, ARGV[i], first[1], notice}
    else lost[#lost + 1] = {outbox, first[1]} end
  end
end
for _, each in ipairs(lost) do call('ZREM', each[1], each[2]) end
local reply = {1}
for _, each in ipairs(found) do
  call('ZADD', each[1], format('%.0f', now + LEASE_MS), each[3])
  reply[#reply + 1] = each[2]
  reply[#reply + 1] = each[3]
  reply[#reply + 1] = each[4].attempts
  reply[#reply + 1] = each[4].payload
end
return reply
