-- The log of a queue: a stream of the transitions of its jobs.

local MAX_LOG_ENTRIES = 100000

-- Adds one entry for a batch of transitions: `moved` is {status = {id, ...}}. A key of another type
-- in place of the log loses the entry and stops no script half way.
local function log_transitions(q, moved)
  local fields = {}
  for status, ids in pairs(moved) do
    if #ids > 0 then
      fields[#fields + 1] = status
      fields[#fields + 1] = cmsgpack.pack(ids)
    end
  end
  if #fields > 0 then
    redis.pcall('XADD', q.log, 'MAXLEN', '~', MAX_LOG_ENTRIES, '*', unpack(fields))
  end
end
