-- How scripts report stored state that this library did not write: the error reply "CORRUPT <key> <what is wrong>".
-- A script replies it before its first write. The key ends at the first space: names in these keys are percent-encoded.
-- Python makes it CorruptState(key, what is wrong) in one place, transport/delivery.py.
local function corrupt(key, wrong)
  return redis.error_reply('CORRUPT ' .. key .. ' ' .. wrong)
end
