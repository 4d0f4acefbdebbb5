-- open: read a namespace's schema version and epoch, or create them. A new epoch shows that the server lost its data.
-- KEYS
--   meta    HASH  agentperf:meta
-- ARGV
--   schema  int   major version of the data model that the caller writes
--   epoch   text  random text; becomes the epoch of a namespace that has none
-- RETURNS
--   {1, schema, epoch}   the namespace is open. The epoch is empty if none is stored and the ACL user may not write
--   {-1, schema, epoch}  a newer major version has written the namespace; this call wrote nothing
-- REPEAT  the first call creates the namespace, every later call reads it
-- ERRORS  CORRUPT if the schema in meta is not a number; nothing was written
-- COST    O(1)
--@include corrupt
--@include whole_number
local META = KEYS[1]
local SCHEMA, EPOCH = ARGV[1], ARGV[2]

local found = redis.call('HMGET', META, 'schema', 'epoch')
local schema = whole_number(found[1], tonumber(SCHEMA))
if not schema then
  return corrupt(META, 'a schema that is no number')
end
if schema > tonumber(SCHEMA) then
  return {-1, schema, found[2] or ''}
end
if not found[1] or not found[2] then
  -- The simulated server of the unit tests lacks acl_check_cmd.
  if redis.acl_check_cmd and not redis.acl_check_cmd('HSET', META, 'schema', SCHEMA) then return {1, schema, ''} end
  local clock = redis.call('TIME')
  local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
  redis.call('HSET', META, 'schema', SCHEMA, 'epoch', EPOCH, 'created_ms', string.format('%.0f', now_ms))
  return {1, tonumber(SCHEMA), EPOCH}
end
return {1, schema, found[2]}
