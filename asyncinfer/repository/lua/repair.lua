#!lua flags=allow-oom
-- repair: puts back jobs that two passes found out of place, and forgets facts of ended ones.
-- KEYS    1 the queue, 2 the zset of odd ids
-- ARGV    1 {pause, ttl} pause in ms between the two passes, ttl of the zset in ms;
--         then ids that looked out of place
-- Returns {put back, still odd}

local q, odd, a, now = queue(KEYS[1]), KEYS[2], cmsgpack.unpack(ARGV[1]), now_ms()

local function in_a_list(id)
  for _, list in ipairs({ q.list, q.high, q.low }) do
    if redis.call('LPOS', list, id) then return true end
  end
  return redis.call('ZSCORE', q.delayed, id) ~= false
end

local function in_a_claim(id)
  local token = redis.call('HGET', q.running, id)
  return token and redis.call('ZSCORE', q.leases, token)
end

-- LPOS walks the list, so the first pass takes the caller's word for it.
local function out_of_place(id, facts, since)
  local status = value_at(job(id, 'status'))
  if status == 'processing' then return not in_a_claim(id) end
  if status == 'pending' then return not (since and in_a_list(id)) end
  if facts then redis.call('HDEL', q.facts, id) end
  return false
end

-- What left a list behind our back is counted still, unless the queue has been empty since.
settle(q, 0)
local uncounted = redis.call('EXISTS', q.bytes) == 0
local back, waits, bytes = {}, 0, 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local facts = unpacked(redis.call('HGET', q.facts, id))
  local since = tonumber(redis.call('ZSCORE', odd, id))
  if not out_of_place(id, facts, since) then
    redis.call('ZREM', odd, id)
  elseif since and now - since >= a.pause then
    redis.call('ZREM', odd, id)
    put_back(q, id, facts)
    if uncounted then bytes = bytes + counted_bytes(id) end
    back[#back + 1] = id
  else
    redis.call('ZADD', odd, 'NX', now, id)
    waits = waits + 1
  end
end
if waits > 0 then redis.call('PEXPIRE', odd, a.ttl) end
if #back > 0 then
  settle(q, bytes)
  record(q, { pending = back })
  ring(q)
end
return { #back, waits }
