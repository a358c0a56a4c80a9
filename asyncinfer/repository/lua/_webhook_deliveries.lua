-- The deliveries of a job, as the hash of its webhook has them.

-- The deliveries of a job, as lists of their fields in its webhook's hash (`<round>_<event>`): those
-- to come, and those that are done, the oldest first; and whether one of these was given up.
local function deliveries_of(q, id)
  local open, done, is_given_up, names = {}, {}, false, redis.pcall('HKEYS', q['webhook:' .. id])
  for i = 1, #names do
    local name = names[i]
    if name:match('^%d+_%l+$') then
      local member = id .. '_' .. name
      if type(redis.pcall('ZSCORE', q.outbox, member)) == 'string' then
        open[#open + 1] = name
      else
        done[#done + 1] = name
        is_given_up = is_given_up or type(redis.pcall('ZSCORE', q.undelivered, member)) == 'string'
      end
    end
  end
  table.sort(done, function(a, b) return tonumber(a:match('^%d+')) < tonumber(b:match('^%d+')) end)
  return open, done, is_given_up
end
