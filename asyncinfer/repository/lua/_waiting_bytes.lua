-- include: job_keys waiting
-- The bytes of jobs that begin or cease to wait.

-- Bytes of a job's input; 0 if it is gone or an external producer wrote something else than a
-- string there.
local function input_bytes(id)
  local size = redis.pcall('STRLEN', job_key(id, 'data'))
  return type(size) == 'number' and size or 0
end

-- Adjusts the number of waiting bytes by `bytes`. If no job waits there is nothing to count, there
-- are no stale entries, and no doorbell token is needed.
-- Returns how many jobs wait; `count` is that number if the caller knows it and no job is delayed.
local function adjust_waiting_bytes(q, bytes, count)
  local left = count or count_waiting(q)
  if left == 0 and (count or redis.call('ZCARD', q.delayed) == 0) then
    redis.call('DEL', q.bytes, q.stale, q.wake)
  elseif bytes ~= 0 then
    add_waiting_bytes(q, bytes)
  end
  return left
end
