-- How many jobs and bytes wait in a queue's lists.

-- Returns how many ids are in the queue's three lists: stale entries count, delayed jobs do not.
local function count_waiting(q)
  return redis.call('LLEN', q.high) + redis.call('LLEN', q.list) + redis.call('LLEN', q.low)
end

-- Adds `bytes` (may be negative) to the number of waiting bytes. A number that is corrupt, or
-- negative afterwards, becomes `bytes`, or 0 if that is negative.
local function add_waiting_bytes(q, bytes)
  local sum = redis.pcall('INCRBY', q.bytes, bytes)
  if type(sum) ~= 'number' or sum < 0 then redis.call('SET', q.bytes, math.max(0, bytes)) end
end
