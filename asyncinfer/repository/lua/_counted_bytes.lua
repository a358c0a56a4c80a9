-- include: job_keys waiting_bytes
-- The share of a job in the number of waiting bytes.

-- The bytes of an external job, which has no meta, were never added.
local function counted_bytes(id)
  return redis.call('EXISTS', job_key(id, 'meta')) == 1 and input_bytes(id) or 0
end
