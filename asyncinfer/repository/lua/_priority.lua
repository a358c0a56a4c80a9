-- include: fact_names
-- Which of a queue's three lists a job waits in.

local function priority_list(q, facts)
  local priority = facts and facts[PRIORITY]
  return (priority == 'high' or priority == 'low') and q[priority] or q.list
end
