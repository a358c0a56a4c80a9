-- The idempotency keys of jobs: the value of q['idem:' .. digest] begins with the id of its job.

-- The names of the idempotency keys of jobs, in the order of `owners`, at least one {id, digest}:
-- false where the key is gone or names a later job. A key may expire before its job, which then
-- must not touch what the next submit with that key has written.
local function own_idempotency_keys(q, owners)
  local names = {}
  for i, owner in ipairs(owners) do names[i] = q['idem:' .. owner.digest] end
  for i, value in ipairs(redis.call('MGET', unpack(names))) do
    local prefix = owners[i].id .. ' '
    if not value or value:sub(1, #prefix) ~= prefix then names[i] = false end
  end
  return names
end

-- Lets the idempotency keys of jobs, at least one {id, digest, ttl}, expire in `ttl` seconds.
local function expire_idempotency_keys(q, owners)
  for i, name in ipairs(own_idempotency_keys(q, owners)) do
    if name then redis.call('EXPIRE', name, owners[i].ttl) end
  end
end
