-- include: waiting
-- The bytes of jobs that begin or cease to wait.

-- Call after the lists have changed. Adds `bytes` (may be negative) to the number of waiting bytes;
-- if the lists are empty and no job is delayed, deletes that number, the stale entries and the
-- doorbell tokens instead: there is nothing to count then, and nothing to wake a worker for.
-- Returns the length of the three lists: stale entries count, delayed jobs do not. `count` is that
-- length if the caller knows it and no job is delayed, else false or nil.
local function adjust_waiting_bytes(q, bytes, count)
  local left = count or count_waiting(q)
  if left == 0 and (count or redis.call('ZCARD', q.delayed) == 0) then
    redis.call('DEL', q.bytes, q.stale, q.wake)
  elseif bytes ~= 0 then
    add_waiting_bytes(q, bytes)
  end
  return left
end
