-- Reads and writes the record of an instance in a release. This code is not in records.lua: acquire also includes
-- records.lua, and would create write_release on every call. Needs records.lua; pool.lua describes all fields.

-- Matches the record of an instance for a release. A release copies limit, seq, fence and peak unchanged; of these, it
-- parses only limit and seq. The rest of the record after streak is one text.
local RELEASE = '^load=(%d+) (limit=(%d+) seq=(%d+) %S+ %S+) ewma_us=(%d+) ewma_at_ms=(%d+) served=(%d+) '
  .. 'failed=(%d+) streak=(%d+)( .*)$'
local function write_release(load, same, ewma_us, ewma_at_ms, served, failed, streak, rest)
  return 'load=' .. load .. ' ' .. same .. ' ewma_us=' .. ewma_us .. ' ewma_at_ms=' .. ewma_at_ms
    .. ' served=' .. served .. ' failed=' .. failed .. ' streak=' .. streak .. rest
end
-- Most instances have neither labels nor flags. The fastest test for this is a search for the text PLAIN in the record.
local PLAIN = ' labels=- flags=- cap='
local PLAIN_WEIGHT = '^ weight=(%d+%.?%d*) labels=%- flags=%- cap='
local SLOW_AFTER = ' slow_after_us=(%d+)'
