-- The control stream of a queue, which its workers read.

local MAX_CONTROL_ENTRIES = 1000
local CONTROL_TTL_SECONDS = 3600

-- `event` is cancel, expire, pause or resume. A key of another type in place of the stream loses it
-- and stops no script half way.
local function notify_workers(q, event, id)
  redis.pcall('XADD', q.control, 'MAXLEN', '~', MAX_CONTROL_ENTRIES, '*', event, id)
  redis.call('EXPIRE', q.control, CONTROL_TTL_SECONDS)
end
