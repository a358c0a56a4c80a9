-- How the name of a delivery is read.

-- The job's id, the field of its webhook's hash, and the name of the round, of a delivery's name;
-- nil if it is none.
local function parse_delivery(member)
  local id, round, event = member:match('^(.+)_(%d+)_(%l+)$')
  if not id then return nil end
  return id, round .. '_' .. event, id .. '_' .. round
end
