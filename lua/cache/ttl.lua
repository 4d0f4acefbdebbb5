-- ttl: return the remaining TTL of a value. Writes nothing.
-- KEYS
--   entry   STRING  <tag>:e:<key>
--   epochs  STRING  <tag>:epochs
--   tags    ZSET    <tag>:tags
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   none
-- RETURNS
--   {1, left_ms}  milliseconds until the value expires; -1 for never
--   {0}           there is no value, or it was invalidated
-- REPEAT  a second delivery reads again
-- ERRORS  refused if `tags` has a wrong type; an entry of a wrong type counts as no value
-- COST    O(1); O(tags of the entry) if a tag of the cache was invalidated after the entry was written
--@include whole_number
--@include header
--@include live
local ENTRY, EPOCHS, TAGS = KEYS[1], KEYS[2], KEYS[3]

local found = redis.call('MGET', ENTRY, EPOCHS)
if not live(redis.call, found[1], found[2], TAGS) then return {0} end
return {1, redis.call('PTTL', ENTRY)}
