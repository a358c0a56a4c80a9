-- The server's clock.

-- Milliseconds since 1970, whole and with their fraction.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000), time[1] * 1000 + time[2] / 1000
end
