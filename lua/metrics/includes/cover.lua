-- Shared by the scripts that read time slices: the slices that cover a time range. Needs slices.lua.

-- Of the slices that contain a timestamp, find the narrowest one that is kept. Return the index of its width in TIERS;
-- nil if none of these slices is kept.
local function finest(ms, now, ttls)
  for t = 1, 4 do
    local width = TIERS[t][WIDTH]
    if ttls[t] > 0 and floor(ms / width) * width + width + ttls[t] > now then return t end
  end
  return nil
end

-- Return the start of the oldest slice that is kept; nil if no slices are kept.
local function oldest_kept(now, ttls)
  local oldest
  for t = 1, 4 do
    local width = TIERS[t][WIDTH]
    local start = floor((now - ttls[t]) / width) * width
    if ttls[t] > 0 and (not oldest or start < oldest) then oldest = start end
  end
  return oldest
end

-- Cover the time range [from, to) with slices, beginning at its start. At each point, take the widest kept slice that
-- starts there and ends in the range. With `to_now`, the range ends now, and a slice that contains the current time
-- counts as ending now. If no kept slice fits, take the narrowest kept slice that contains the point, or the slice of a
-- day if none is kept. Such a slice may widen the range. Returns four values: the slices, each as {tier, start}; the
-- start of the covered range; its end; the width of the first slice that did not fit, ms, or nil if all slices fit.
local function covering(from, to, to_now, now, ttls)
  local slices, misfit = {}, nil
  local at = from
  while at < to do
    local taken
    for wide = 4, 1, -1 do
      local width = TIERS[wide][WIDTH]
      local kept = at % width == 0 and ttls[wide] > 0 and at + width + ttls[wide] > now
      if kept and (at + width <= to or (to_now and at + width > now)) then
        taken = wide
        break
      end
    end
    if not taken then  -- no kept slice fits: take one that contains `at`, which may widen the range
      taken = finest(at, now, ttls) or 4
      local width = TIERS[taken][WIDTH]
      misfit = misfit or width
      at = floor(at / width) * width
      if #slices == 0 then from = at end
      to = math.max(to, math.min(at + width, now + 1))
    end
    slices[#slices + 1] = {TIERS[taken], at}
    at = at + TIERS[taken][WIDTH]
  end
  return slices, from, to, misfit
end
