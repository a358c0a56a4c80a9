-- include: waiting
-- How many jobs of a queue have not ended.

-- Returns how many jobs wait, are delayed, or run; stale entries do not count.
local function count_unfinished(q)
  local waits = count_waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.stale)
  return math.max(0, waits) + redis.call('HLEN', q.running)
end
