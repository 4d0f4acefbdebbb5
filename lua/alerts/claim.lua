-- claim: claim rules that are due. Each evaluation goes to one caller, so processes share the rules without a leader.
-- KEYS
--   rules     HASH  agentperf:{alerts}:rules
--   schedule  HASH  agentperf:{alerts}:schedule
-- ARGV
--   now_ms    int   time of the evaluation, ms since 1970; -1: the server's time minus delay_ms
--   delay_ms  int   time that records may take to arrive, ms
--   count     int   max rules to claim
--   token     text  identifies this claim in the report
-- RETURNS
--   {1, version, wait_ms, rule, at_ms, rule, at_ms ...}   version: number of the deployment, 0 if there is none
--     wait_ms: time until the next rule is due, ms, at most 10000; 0: more than count rules are due now
--     at_ms: end of the window to evaluate, ms since 1970, a multiple of the interval of the rule
-- REPEAT  a second delivery returns the rules that the first delivery claimed. A rule is left out if its result was
--         reported, or if a later request claimed the rule. Other due rules are claimed too, up to count rules in total
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a text that this library did not write; nothing was changed
-- COST    O(rules)
--@include corrupt
--@include whole_number
--@include alerts
local RULES, SCHEDULE = KEYS[1], KEYS[2]
local NOW_MS, DELAY_MS, COUNT, TOKEN = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]

local IDLE_MS = 10000
for _, key in ipairs({RULES, SCHEDULE}) do
  local wrong = of_other_type(key, 'hash')
  if wrong then return wrong end
end
local version = whole_number(call('HGET', RULES, 'version'), 0)
if not version then return corrupt(RULES, 'a version that is no number') end
local now = NOW_MS >= 0 and NOW_MS or clock_ms() - DELAY_MS
local due, wait_ms = {}, IDLE_MS
local stored = call('HGETALL', SCHEDULE)
for i = 1, #stored, 2 do
  local rule = read_schedule(stored[i + 1])
  if not rule then return corrupt(SCHEDULE, 'a schedule that this library did not write') end
  local at = floor(now / rule.every) * rule.every
  if rule.token == TOKEN then  -- claimed by an earlier copy of this request, whose reply was lost
    due[#due + 1] = {stored[i], rule, rule.due - rule.every}
  elseif rule.due <= at or rule.due > at + rule.every then  -- due > at + every: the clock was set back
    due[#due + 1] = {stored[i], rule, at}
  else
    wait_ms = math.min(wait_ms, rule.due - now)
  end
end
table.sort(due, function(a, b)
  local is_ours, is_theirs = a[2].token == TOKEN, b[2].token == TOKEN
  if is_ours ~= is_theirs then return is_ours end
  if a[2].due ~= b[2].due then return a[2].due < b[2].due end
  return a[1] < b[1]
end)
local reply = {1, version, 0}
for i, each in ipairs(due) do
  if i > COUNT then break end
  local name, rule, at = each[1], each[2], each[3]
  call('HSET', SCHEDULE, name, write_schedule(rule.every, at + rule.every, TOKEN))
  reply[#reply + 1] = name
  reply[#reply + 1] = at
  wait_ms = math.min(wait_ms, at + rule.every - now)
end
reply[3] = #due > COUNT and 0 or math.max(0, floor(wait_ms))
return reply
