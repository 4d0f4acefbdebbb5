-- Decode a whole number that the codec has stored: the letter m, followed by the number in msgpack form. Returns nil
-- for any other value. Also returns nil for numbers of at least 2^53 or at most -2^53, because a double cannot hold all
-- of them exactly. The library cmsgpack is not used: it accepts other types, and not every server has it.
local function decode_integer(value)
  local first = string.byte(value, 2)
  if string.byte(value, 1) ~= 109 or not first then return nil end
  if #value == 2 then
    if first < 128 then return first elseif first >= 224 then return first - 256 end
    return nil
  end
  local size = ({[204] = 1, [205] = 2, [206] = 4, [207] = 8, [208] = 1, [209] = 2, [210] = 4, [211] = 8})[first]
  if #value ~= (size or -3) + 2 then return nil end
  local number, negative = 0, first >= 208 and string.byte(value, 3) >= 128
  for i = 3, #value do
    local byte = string.byte(value, i)
    number = number * 256 + (negative and 255 - byte or byte)
  end
  if number >= 2^53 then return nil end
  if negative then number = -1 - number end
  return number > -2^53 and number or nil
end

-- Encode a whole number between -2^53 and 2^53 in the shortest form that `decode_integer` reads.
local function encode_integer(number)
  if number >= 0 and number < 128 then return 'm' .. string.char(number) end
  if number < 0 and number >= -32 then return 'm' .. string.char(256 + number) end
  local size = 1
  while size < 8 and (number >= 256^size or number < -(256^size) / 2) do size = size * 2 end
  local kind = ({[1] = 0, [2] = 1, [4] = 2, [8] = 3})[size] + (number < 0 and 208 or 204)
  local rest, bytes = number < 0 and -1 - number or number, ''
  for _ = 1, size do
    local byte = rest % 256
    bytes = string.char(number < 0 and 255 - byte or byte) .. bytes
    rest = (rest - byte) / 256
  end
  return 'm' .. string.char(kind) .. bytes
end
