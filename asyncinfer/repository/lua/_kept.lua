-- The bytes that ended jobs keep (inputs, results, errors) until their keys expire: `q.kept` has
-- them by the minute of that time, `q.keptbytes` has the sum.

-- A job that keeps less is not counted: its status and meta take as much, and two commands would
-- add a tenth to what the end of a small job costs.
local MIN_KEPT_BYTES = 1024

-- Counts `bytes` more (may be negative) that are kept until `expires_ms`. A key of another type or
-- a corrupt number loses the count and stops no script half way; a sweep makes the sum anew.
local function add_kept_bytes(q, expires_ms, bytes)
  local count = redis.pcall('HINCRBY', q.kept, math.floor(expires_ms / 60000), bytes)
  if type(count) == 'number' then redis.pcall('INCRBY', q.keptbytes, bytes) end
end
