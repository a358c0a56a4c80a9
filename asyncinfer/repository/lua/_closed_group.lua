-- Whether a group takes jobs.

-- Whether a group is closed, by the key of its list, `{N}:group:<digest>`. `known` is a table for
-- one call, which reads each group once.
local function is_closed(known, list)
  if known[list] == nil then
    local key = list:gsub(':group:(%x+)$', ':closed:%1')
    known[list] = redis.call('EXISTS', key) == 1
  end
  return known[list]
end
