-- beat: record that a worker is alive, and its state. A worker is one client of one process.
-- KEYS
--   seen           ZSET  agentperf:{workers}:seen
--   record         HASH  agentperf:{workers}:w:<worker>
-- ARGV
--   worker         text  name of the worker
--   age_ms         int   time since the worker began, ms
--   keep_ms        int   max age of a worker's last heartbeat, ms; a worker with an older heartbeat is forgotten
--   max_workers    int   max workers of the namespace; further workers are not recorded
--   host           text  host of the worker's process
--   pid            int   id of this process
--   python         text  version of Python
--   version        text  version of this library
--   leases         int   number of leases that the worker holds
--   pending        int   number of executions that wait to be counted, because the last flush of the worker failed
--   dropped        int   number of executions that were dropped and never counted
--   error          text  error of the last flush; empty if the flush succeeded
--   more           int   number of running executions that are not in the argument executions...
--   executions...  any   two values for each running execution, the oldest first: its agent, percent-encoded; its age,
--                        ms
-- RETURNS
--   {1, now_ms}  recorded
--   {0, now_ms}  not recorded, because max_workers other workers are recorded
-- REPEAT  a second delivery records the same state, with the time of the second delivery
-- ERRORS  CORRUPT <key>: the key has a wrong type, or a time that is no number; nothing was written
-- COST    O(log N + executions) for N workers, and O(log N) for each worker that is forgotten
--@include corrupt
--@include whole_number
local SEEN, RECORD = KEYS[1], KEYS[2]
local WORKER, AGE_MS, KEEP_MS = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local MAX_WORKERS, HOST, PID = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local PYTHON, VERSION, LEASES, PENDING = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local DROPPED, ERROR, MORE, EXECUTIONS = ARGV[11], ARGV[12], ARGV[13], 14

local call = redis.call
local function whole(number)  -- tostring would lose digits from 10^14 up
  return string.format('%.0f', number)
end
for key, wanted in pairs({[SEEN] = 'zset', [RECORD] = 'hash'}) do
  local found = call('TYPE', key).ok
  if found ~= wanted and found ~= 'none' then return corrupt(key, 'a ' .. found) end
end
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
-- Keep the start that the first heartbeat stored. A start that each heartbeat computes would vary with the latency.
local since = whole_number(call('HGET', RECORD, 'since_ms'), math.max(0, now - AGE_MS))
if not since then return corrupt(RECORD, 'a time that is no number') end
-- A heartbeat later than `last` was stored before the server's clock was set back. It does not count.
local first, last = whole(now - KEEP_MS), whole(now + KEEP_MS)
if not call('ZSCORE', SEEN, WORKER) and call('ZCOUNT', SEEN, first, last) >= MAX_WORKERS then return {0, now} end

local executions = {}
for i = EXECUTIONS, #ARGV, 2 do
  executions[#executions + 1] = ARGV[i]
  executions[#executions + 1] = whole(math.max(0, now - tonumber(ARGV[i + 1])))
end
call('ZADD', SEEN, whole(now), WORKER)
call('ZREMRANGEBYSCORE', SEEN, '-inf', '(' .. first)
call('ZREMRANGEBYSCORE', SEEN, '(' .. last, '+inf')
call('HSET', RECORD, 'host', HOST, 'pid', PID, 'since_ms', whole(since), 'python', PYTHON, 'version', VERSION,
  'leases', LEASES, 'pending', PENDING, 'dropped', DROPPED, 'error', ERROR, 'more', MORE,
  'running', table.concat(executions, ' '))
call('PEXPIRE', SEEN, KEEP_MS)
call('PEXPIRE', RECORD, KEEP_MS)
return {1, now}
