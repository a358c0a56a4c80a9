-- The log of a queue: a stream of the transitions of its jobs.

-- Adds one entry for a batch of transitions: `moved` is {word = {id, ...}}; a word is the new
-- status, `submitted`, or `stranger` (external jobs at their first claim). Empty lists are left
-- out, and no entry is added if all are empty. A key of another type in place of the log loses the
-- entry and stops no script half way.
local function log_transitions(q, moved)
  local max_entries, fields = 100000, {}
  for status, ids in pairs(moved) do
    if #ids > 0 then
      fields[#fields + 1] = status
      fields[#fields + 1] = cmsgpack.pack(ids)
    end
  end
  if #fields > 0 then
    redis.pcall('XADD', q.log, 'MAXLEN', '~', max_entries, '*', unpack(fields))
  end
end
