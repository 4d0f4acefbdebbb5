-- Updates ewma_us and ewma_at_ms of an instance with response_us, the response time of one task. `response` is the
-- pool's kind of update, see strategies.lua. These are lines of release, not a function: release includes them twice,
-- and its usual case would be slower if it created a function on every call.
ewma_us = tonumber(ewma_us)
if response == 'peak' then
  -- A higher latency replaces the smoothed latency at once. A lower latency replaces it gradually, with a time constant
  -- of 10 s.
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
