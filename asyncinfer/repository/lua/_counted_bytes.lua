-- include: job_keys stored_bytes
-- The share of a job in the number of waiting bytes.

-- The bytes by which a job raises the number of waiting bytes while it waits: those of its input,
-- but 0 for an external job, which has no meta and whose bytes were never added.
local function counted_bytes(id)
  return redis.call('EXISTS', job_key(id, 'meta')) == 1 and stored_bytes(id, 'data') or 0
end
