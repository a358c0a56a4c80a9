-- include: fact_names
-- Which of a queue's three lists a job waits in.

-- The key of the list in which a job of these facts waits: q.high, q.low, or else q.list. `facts`
-- are unpacked; nil or without a priority means normal.
local function priority_list(q, facts)
  local priority = facts and facts[PRIORITY]
  return (priority == 'high' or priority == 'low') and q[priority] or q.list
end
