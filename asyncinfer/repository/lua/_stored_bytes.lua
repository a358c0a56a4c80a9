-- include: job_keys
-- The size of what is stored of a job.

-- Returns the bytes of one of a job's keys, `word` as in `job_key`; 0 if it is gone, or if an
-- external producer wrote something else than a string there.
local function stored_bytes(id, word)
  local size = redis.pcall('STRLEN', job_key(id, word))
  return type(size) == 'number' and size or 0
end
