-- The server's clock.

-- Returns two numbers: milliseconds since 1970 by the server's clock, whole, and with the fraction.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000), time[1] * 1000 + time[2] / 1000
end
