-- Closed groups that are followed: `q.closing` has when each is looked at next, and `q.closers` whose
-- it is, and how many each tenant has.

-- Follows a group of a tenant from `now` on.
local function follow_group(q, digest, tenant, now)
  redis.call('ZADD', q.closing, now, digest)
  redis.pcall('HSET', q.closers, digest, tenant)
  redis.pcall('HINCRBY', q.closers, ':' .. tenant, 1)
end

-- Takes a group off its tenant's count; does nothing if it has no place there.
local function uncount_group(q, digest)
  local tenant = redis.pcall('HGET', q.closers, digest)
  if type(tenant) ~= 'string' then return end
  redis.pcall('HDEL', q.closers, digest)
  local left = redis.pcall('HINCRBY', q.closers, ':' .. tenant, -1)
  if type(left) ~= 'number' or left <= 0 then redis.pcall('HDEL', q.closers, ':' .. tenant) end
end

-- Follows a group no more.
local function unfollow_group(q, digest)
  redis.call('ZREM', q.closing, digest)
  uncount_group(q, digest)
end

-- How many groups of a tenant are followed. Corrects a part of what another program, or a release
-- that does not count, has left there.
local function followed_of(q, tenant)
  if redis.call('EXISTS', q.closing) == 0 then redis.call('DEL', q.closers) end
  local some = redis.pcall('HRANDFIELD', q.closers, 10)
  for i = 1, #some do
    if some[i]:sub(1, 1) ~= ':' and not redis.call('ZSCORE', q.closing, some[i]) then
      uncount_group(q, some[i])
    end
  end
  local count = redis.pcall('HGET', q.closers, ':' .. tenant)
  return type(count) == 'string' and tonumber(count) or 0
end
