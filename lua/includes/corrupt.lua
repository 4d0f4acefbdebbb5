-- Return the error reply for stored state that this library did not write: "CORRUPT <key> <what is wrong>". A script
-- returns this reply before its first write. The key ends at the first space: names in keys are percent-encoded, so a
-- key contains no space. In Python, transport/delivery.py converts the reply to CorruptState(key, what is wrong).
local function corrupt(key, wrong)
  return redis.error_reply('CORRUPT ' .. key .. ' ' .. wrong)
end
