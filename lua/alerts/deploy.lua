-- deploy: replace all rules and receivers in one step. A new rule keeps the states of an old rule of the same name.
-- KEYS
--   rules      HASH  agentperf:{alerts}:rules
--   schedule   HASH  agentperf:{alerts}:schedule
--   silences   HASH  agentperf:{alerts}:silences
--   notices    HASH  agentperf:{alerts}:notices
--   receivers  HASH  agentperf:{alerts}:receivers
--   The keys state:<rule> and outbox:<address> are computed here, under the same hash tag.
-- ARGV
--   fields     int   number of fields to store in the hash `rules`
--   scheduled  int   number of rules to schedule
--   values...  text  name and text of each field; then name and interval in ms of each rule to schedule; then the
--                    addresses. Rule names and addresses are percent-encoded
-- RETURNS
--   {1, version, n}  deployed; version: number of this deployment; n: number of rules that were removed
-- REPEAT  a second delivery deploys the same rules as a further version
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a version that is no number; nothing was changed
-- COST    O(rules + addresses + waiting notifications of removed addresses)
--@include corrupt
--@include whole_number
--@include alerts
local RULES, SCHEDULE, SILENCES, NOTICES, RECEIVERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIELDS, SCHEDULED, VALUES = tonumber(ARGV[1]), tonumber(ARGV[2]), 3

local TAG = string.sub(RULES, 1, -6)
for _, key in ipairs({RULES, SCHEDULE, SILENCES, NOTICES, RECEIVERS}) do
  local wrong = of_other_type(key, 'hash')
  if wrong then return wrong end
end
local version = whole_number(call('HGET', RULES, 'version'), 0)
if not version then return corrupt(RULES, 'a version that is no number') end

local rules, addresses, at = {}, {}, VALUES + 2 * FIELDS
for i = at, at + 2 * SCHEDULED - 1, 2 do rules[ARGV[i]] = ARGV[i + 1] end
for i = at + 2 * SCHEDULED, #ARGV do addresses[ARGV[i]] = true end
local removed, gone = {}, {}
local old = call('HGETALL', SCHEDULE)
for i = 1, #old, 2 do
  if not rules[old[i]] then removed[#removed + 1] = old[i] end
end
old = call('HGETALL', RECEIVERS)
for i = 1, #old, 2 do
  if not addresses[old[i]] then
    local wrong = of_other_type(TAG .. 'outbox:' .. old[i], 'zset')
    if wrong then return wrong end
    gone[#gone + 1] = old[i]
  end
end

call('UNLINK', RULES)
call('HSET', RULES, 'version', format('%.0f', version + 1), 'deployed_ms', format('%.0f', clock_ms()))
for i = VALUES, at - 1, 2 do call('HSET', RULES, ARGV[i], ARGV[i + 1]) end
for _, name in ipairs(removed) do
  call('UNLINK', TAG .. 'state:' .. name)
  call('HDEL', SCHEDULE, name)
  call('HDEL', SILENCES, name)
end
for name, every_ms in pairs(rules) do call('HSET', SCHEDULE, name, write_schedule(tonumber(every_ms), 0, '-')) end
for _, name in ipairs(gone) do
  for _, id in ipairs(call('ZRANGE', TAG .. 'outbox:' .. name, 0, -1)) do call('HDEL', NOTICES, name .. '|' .. id) end
  call('UNLINK', TAG .. 'outbox:' .. name)
  call('HDEL', RECEIVERS, name)
end
for name in pairs(addresses) do call('HSETNX', RECEIVERS, name, write_address(read_address(nil))) end
return {1, version + 1, #removed}
