-- These functions read the header of an entry; the functions in header_writer.lua write it. In Python,
-- cache/entry_format.py does both. Needs whole_number.lua. A header has one of two forms:
--   <version>.<request>                                               without further facts: the usual case
--   <version>+<request><expiry> <cost> <fresh> <tags> <size> <key>    otherwise
-- The value follows the header. Version has 8 digits in base 90; the digit for 0 is "%". Request is the first 5
-- characters of the request id. Expiry is in ms since 1970, 0 for never. Cost is the computing time, ms. Fresh is the
-- time after the write for which the value is fresh, ms. Size is the size of the key, bytes.
-- The usual header has 14 bytes. Even without a header, the allocator would reserve 1,024 bytes for a value of 1,000
-- bytes. So the header of such a value takes no extra memory.

-- Return the version at the beginning of an entry; nil if there is none.
local function entry_version(entry)
  local a, b, c, d, e, f, g, h = string.byte(entry or '', 1, 8)
  if not h or math.min(a, b, c, d, e, f, g, h) < 37 or math.max(a, b, c, d, e, f, g, h) > 126 then return nil end
  return ((((((((a - 37) * 90 + b - 37) * 90 + c - 37) * 90 + d - 37) * 90 + e - 37) * 90 + f - 37) * 90 + g - 37) * 90
    + h - 37)
end

-- Return version, request, expiry, cost, fresh and tags, then the positions of the key and of the value. Returns nil if
-- the header cannot be read. The version and the positions are numbers, the other results are texts.
local function read_header(entry)
  local version = entry_version(entry)
  local form, request = string.match(entry or '', '^([.+])([%w_-][%w_-][%w_-][%w_-][%w_-])', 9)
  if not version or not form then return nil end
  if form == '.' then return version, request, '0', '0', '0', '', 15, 15 end
  local expiry, cost, fresh, tags, size, key_at = string.match(entry, '^(%d+) (%d+) (%d+) (%S*) (%d+) ()', 15)
  if not (whole_number(expiry) and whole_number(fresh) and whole_number(size)) then return nil end
  return version, request, expiry, cost, fresh, tags, key_at, key_at + tonumber(size)
end
