-- The control stream of a queue, which its workers read.

-- Sends an event to the queue's workers: cancel or expire with a job's id, pause or resume with an
-- id of ''. A key of another type in place of the stream loses the event and stops no script half
-- way.
local function notify_workers(q, event, id)
  local max_entries, ttl_seconds = 1000, 3600
  redis.pcall('XADD', q.control, 'MAXLEN', '~', max_entries, '*', event, id)
  redis.call('EXPIRE', q.control, ttl_seconds)
end
