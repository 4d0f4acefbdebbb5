-- These functions write the header of an entry; header.lua describes the form of headers.

-- Return a version as 8 characters. The version must be below 90^8.
local function version_digits(version)
  local floor = math.floor
  local low = version % 65610000         -- 90^4
  local high = (version - low) / 65610000
  return string.char(37 + floor(high / 729000) % 90, 37 + floor(high / 8100) % 90, 37 + floor(high / 90) % 90,
    37 + high % 90, 37 + floor(low / 729000), 37 + floor(low / 8100) % 90, 37 + floor(low / 90) % 90, 37 + low % 90)
end

-- Return an entry as text. digits: the version of the entry, as 8 characters; payload: the entry without version and
-- expiry. If the payload begins with "." (byte 46), the header has the short form, which has no expiry.
local function write_entry(digits, expiry, payload)
  if string.byte(payload) == 46 then return digits .. payload end
  return digits .. string.sub(payload, 1, 6) .. expiry .. ' ' .. string.sub(payload, 7)
end
