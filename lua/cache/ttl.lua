-- ttl: return how long a value has to live. Writes nothing.
-- KEYS
--   entry   STRING  <tag>:e:<key>
--   epochs  STRING  <tag>:epochs
--   tags    ZSET    <tag>:tags
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
-- RETURNS
--   {1, left_ms}  milliseconds until the value expires; -1 for never
--   {0}           no value
-- REPEAT  a second delivery reads again
-- ERRORS  tags of a wrong type are refused; an entry of a wrong type is no value
-- COST    O(1), and O(log T) for each tag of an entry that is older than the last invalidation of a tag
--@include whole_number
--@include header
--@include live
local ENTRY, EPOCHS, TAGS = KEYS[1], KEYS[2], KEYS[3]

local found = redis.call('MGET', ENTRY, EPOCHS)
if not live(redis.call, found[1], found[2], TAGS) then return {0} end
return {1, redis.call('PTTL', ENTRY)}
