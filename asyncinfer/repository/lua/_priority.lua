-- include: fact_names
-- Which of a queue's three lists a job waits in.

-- The list that a job of these facts waits in: of high, normal or low priority.
local function priority_list(q, facts)
  local priority = facts and facts[PRIORITY]
  return (priority == 'high' or priority == 'low') and q[priority] or q.list
end
