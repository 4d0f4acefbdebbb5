-- Updates ewma_us of an instance; if `response` is 'peak', also updates ewma_at_ms. response_us is the response time of
-- one task, and `response` is a property of the pool's strategy, see strategies.lua. release includes this file twice.
-- The file still contains no function, because creating a function on every call would slow down the usual case of
-- release.
ewma_us = tonumber(ewma_us)
if response == 'peak' then
  -- A higher response time replaces the smoothed value at once. A lower response time replaces it gradually, with a
  -- time constant of 10 s.
  local clock = call('TIME')
  local now_ms = clock[1] * 1000 + floor(clock[2] / 1000)
  if response_us < ewma_us then
    local keep = math.exp(math.min(0, ewma_at_ms - now_ms) / 10000)
    response_us = ewma_us * keep + response_us * (1 - keep)
  end
  ewma_us, ewma_at_ms = response_us, format('%d', now_ms)
elseif ewma_us == 0 then
  ewma_us = response_us
else
  ewma_us = ewma_us + 0.2 * (response_us - ewma_us)
end
ewma_us = format('%d', (ewma_us > 1 and ewma_us or 1) + 0.5)
