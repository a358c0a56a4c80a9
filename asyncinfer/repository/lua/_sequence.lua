-- The number of jobs that a queue has had.

-- Adds `count` to it and returns the sum. A corrupt number starts again from zero, so that the sum
-- is `count`.
local function advance_sequence(q, count)
  local seq = redis.pcall('INCRBY', q.seq, count)
  if type(seq) == 'number' and seq >= count then return seq end
  redis.call('SET', q.seq, count)
  return count
end
