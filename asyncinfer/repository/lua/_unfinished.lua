-- include: waiting
-- How many jobs of a queue have not ended.

-- Jobs that wait, are delayed, or run.
local function count_unfinished(q)
  local waits = count_waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.stale)
  return math.max(0, waits) + redis.call('HLEN', q.running)
end
