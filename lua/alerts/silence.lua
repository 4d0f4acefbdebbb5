-- silence: silence rules for a time, or end their silences. Adds an event for each rule.
-- KEYS
--   schedule  HASH    agentperf:{alerts}:schedule
--   silences  HASH    agentperf:{alerts}:silences
--   events    STREAM  agentperf:{alerts}:events
-- ARGV
--   for_ms    int     length of the silences, ms; 0: end the present silences
--   now_ms    int     start of the silences, ms since 1970; -1: the server's time
--   event     text    the id that is written into each event
--   rules...  text    percent-encoded
-- RETURNS
--   {1, until_ms, rule ...}   until_ms: end of the silences, ms since 1970. rule: each of the given rules that exists
-- REPEAT  a second delivery starts or ends the silences again, and adds further events. If now_ms is -1, the silences
--         start at the time of the second delivery
-- ERRORS  CORRUPT <key>: the key has a wrong type; nothing was changed
-- COST    O(rules)
--@include corrupt
--@include whole_number
--@include alerts
local SCHEDULE, SILENCES, EVENTS = KEYS[1], KEYS[2], KEYS[3]
local FOR_MS, NOW_MS, EVENT, RULES = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], 4

local EVENTS_KEPT = 5000
local wrong = of_other_type(SCHEDULE, 'hash') or of_other_type(SILENCES, 'hash') or of_other_type(EVENTS, 'stream')
if wrong then return wrong end
local now = NOW_MS >= 0 and NOW_MS or clock_ms()
local until_ms = format('%.0f', now + FOR_MS)
local reply = {1, now + FOR_MS}
for i = RULES, #ARGV do
  if call('HEXISTS', SCHEDULE, ARGV[i]) == 1 then
    if FOR_MS > 0 then call('HSET', SILENCES, ARGV[i], until_ms) else call('HDEL', SILENCES, ARGV[i]) end
    local before, after = 'ok', 'silenced'
    if FOR_MS == 0 then before, after = after, before end
    local at = format('%.3f', now / 1000)
    call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'id', EVENT, 'rule', ARGV[i], 'target', '', 'before', before,
      'after', after, 'at', at, 'value', '-', 'low', '-', 'high', '-', 'reason',
      FOR_MS > 0 and 'silenced by hand' or 'silence ended by hand', 'start', at, 'end', at)
    reply[#reply + 1] = ARGV[i]
  end
end
return reply
