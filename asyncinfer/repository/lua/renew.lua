#!lua flags=allow-oom
-- renew: extends the leases of claims, and returns what has happened to their jobs.
-- KEYS    queues
-- ARGV    1 {lease_ms}; then per queue a packed list of claim tokens, oldest first
-- Returns {lost tokens, ids whose cancel is requested, ids past their deadline}
-- include: keys time value fact_names facts

local args, now = cmsgpack.unpack(ARGV[1]), now_ms()
local lost, cancelled, expired = {}, {}, {}

-- Adds to `cancelled` and `expired` the ids of a claim whose cancel was requested or whose deadline
-- has passed while they run. Does nothing if the claim is gone or its ids are corrupt.
local function check_facts(q, token)
  local packed_ids = value_at(q['claim:' .. token])
  if not packed_ids then return end
  local ids = decode_table(packed_ids) or {}
  if #ids == 0 then return end
  for i, packed in ipairs(redis.call('HMGET', q.facts, unpack(ids))) do
    local facts = decode_table(packed)
    if facts and facts[CANCEL_REQUESTED] then cancelled[#cancelled + 1] = ids[i] end
    if facts and facts[EXPIRED] then expired[#expired + 1] = ids[i] end
  end
end

-- Extends the leases of one queue's claims, each by 1 us more than the one before, so that they
-- keep their order when they are reaped (`tokens` has the oldest first). Adds tokens that have no
-- lease any more to `lost`, and what has happened to jobs of the others to the reply.
local function renew(q, tokens)
  for n, token in ipairs(tokens) do
    if redis.call('ZSCORE', q.leases, token) then
      redis.call('ZADD', q.leases, 'XX', now + args.lease_ms + n / 1000, token)
      pcall(check_facts, q, token)
    else
      lost[#lost + 1] = token
    end
  end
end

-- A queue with a damaged key must not keep the claims of the others from being renewed.
for i, list in ipairs(KEYS) do pcall(renew, queue(list), cmsgpack.unpack(ARGV[i + 1])) end
return { lost, cancelled, expired }
