-- report: store the states, events and notifications that the evaluation of a claimed rule has produced.
-- KEYS
--   rules      HASH    agentperf:{alerts}:rules
--   schedule   HASH    agentperf:{alerts}:schedule
--   state      HASH    agentperf:{alerts}:state:<rule>
--   events     STREAM  agentperf:{alerts}:events
--   notices    HASH    agentperf:{alerts}:notices
--   receivers  HASH    agentperf:{alerts}:receivers
--   The keys outbox:<address> are computed here, under the same hash tag.
-- ARGV
--   version    int     number of the deployment whose rule was evaluated
--   rule       text    percent-encoded
--   token      text    the token of the claim
--   targets    int     number of targets whose state is stored
--   gone       int     number of targets whose state is deleted
--   happened   int     number of events
--   values...  text    name and state of each target whose state is stored; then the name of each target whose state is
--                      deleted; then name and value of the 12 fields of each event; then address, id and payload of
--                      each notification. Names and addresses are percent-encoded
-- RETURNS
--   1   stored
--   0   the rules were deployed again, or a later request claimed the rule; nothing was stored
-- REPEAT  a second delivery changes nothing. It returns 0 if the rules were deployed again, or if a later request
--         claimed the rule; else 1
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a text that this library did not write; nothing was changed
-- COST    O(targets + events + notifications)
--@include corrupt
--@include whole_number
--@include alerts
local RULES, SCHEDULE, STATE, EVENTS, NOTICES, RECEIVERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local VERSION, RULE, TOKEN, TARGETS = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local GONE, HAPPENED, VALUES = tonumber(ARGV[5]), tonumber(ARGV[6]), 7

local EVENTS_KEPT, WAITING_KEPT, EVENT_VALUES = 5000, 200, 24
local TAG = string.sub(RULES, 1, -6)
for _, key in ipairs({RULES, SCHEDULE, STATE, NOTICES, RECEIVERS}) do
  local wrong = of_other_type(key, 'hash')
  if wrong then return wrong end
end
local wrong = of_other_type(EVENTS, 'stream')
if wrong then return wrong end
local version = whole_number(call('HGET', RULES, 'version'), 0)
if not version then return corrupt(RULES, 'a version that is no number') end
local text = call('HGET', SCHEDULE, RULE)
if not text or format('%.0f', version) ~= VERSION then return 0 end
local schedule = read_schedule(text)
if not schedule then return corrupt(SCHEDULE, 'a schedule that this library did not write') end
if schedule.token == '-' .. TOKEN then return 1 end  -- an earlier copy of this report was stored
if schedule.token ~= TOKEN then return 0 end
local first_event = VALUES + 2 * TARGETS + GONE
local first_notice = first_event + EVENT_VALUES * HAPPENED
local states = {}
for i = first_notice, #ARGV, 3 do
  local address = ARGV[i]
  wrong = of_other_type(TAG .. 'outbox:' .. address, 'zset')
  if wrong then return wrong end
  states[address] = read_address(call('HGET', RECEIVERS, address))
  if not states[address] then return corrupt(RECEIVERS, 'a state that this library did not write') end
end

local now = clock_ms()
call('HSET', SCHEDULE, RULE, write_schedule(schedule.every, schedule.due, '-' .. TOKEN))
for i = VALUES, VALUES + 2 * TARGETS - 1, 2 do call('HSET', STATE, ARGV[i], ARGV[i + 1]) end
for i = VALUES + 2 * TARGETS, first_event - 1 do call('HDEL', STATE, ARGV[i]) end
for i = first_event, first_notice - 1, EVENT_VALUES do
  call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', unpack(ARGV, i, i + EVENT_VALUES - 1))
end
for i = first_notice, #ARGV, 3 do
  local address, id, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if call('HEXISTS', RECEIVERS, address) == 1 then
    local outbox = TAG .. 'outbox:' .. address
    call('ZADD', outbox, 0, id)
    call('HSET', NOTICES, address .. '|' .. id, 'attempts=0 made=' .. format('%.0f', now) .. ' ' .. payload)
    if call('ZCARD', outbox) > WAITING_KEPT then  -- ids begin with the time, so the smallest id is the oldest
      local waiting = call('ZRANGE', outbox, 0, -1)
      table.sort(waiting)
      call('ZREM', outbox, waiting[1])
      call('HDEL', NOTICES, address .. '|' .. waiting[1])
      local of = states[address]
      of.dropped = of.dropped + 1
      call('HSET', RECEIVERS, address, write_address(of))
    end
  end
end
return 1
