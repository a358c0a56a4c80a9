-- The names of jobs' keys. Words: data status result error meta.

-- The name of one of a job's keys: `word` is data, status, result, error or meta.
local function job_key(id, word)
  return 'job:' .. id .. ':' .. word
end

-- A list with the name of one key of each job, in the order of `ids`; `suffix` is the word with its
-- colon, as in ':status'.
local function job_keys(ids, suffix)
  local keys = {}
  for i, id in ipairs(ids) do keys[i] = 'job:' .. id .. suffix end
  return keys
end
