-- How many jobs and bytes wait in a queue's lists.

-- How many ids are in the queue's three lists, stale entries included.
local function count_waiting(q)
  return redis.call('LLEN', q.high) + redis.call('LLEN', q.list) + redis.call('LLEN', q.low)
end

-- Adds to the number of waiting bytes; a corrupt number starts again from zero.
local function add_waiting_bytes(q, bytes)
  local sum = redis.pcall('INCRBY', q.bytes, bytes)
  if type(sum) ~= 'number' or sum < 0 then redis.call('SET', q.bytes, math.max(0, bytes)) end
end
