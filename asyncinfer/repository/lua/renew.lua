#!lua flags=allow-oom
-- renew: keeps claims alive, and tells what their jobs have met meanwhile.
-- KEYS    queues
-- ARGV    1 {lease} in ms; then per queue a packed list of claim tokens, oldest first
-- Returns {lost tokens, ids cancelled, ids past their deadline}

local a, now = cmsgpack.unpack(ARGV[1]), now_ms()
local lost, cancelled, expired = {}, {}, {}

local function flagged(q, token)
  local known = value_at(q['claim:' .. token])
  if not known then return end
  local ids = unpacked(known) or {}
  if #ids == 0 then return end
  for i, packed in ipairs(redis.call('HMGET', q.facts, unpack(ids))) do
    local facts = unpacked(packed)
    if facts and facts.c then cancelled[#cancelled + 1] = ids[i] end
    if facts and facts.e then expired[#expired + 1] = ids[i] end
  end
end

local function renew(q, tokens)
  for n, token in ipairs(tokens) do
    if redis.call('ZSCORE', q.leases, token) then
      redis.call('ZADD', q.leases, 'XX', now + a.lease + n / 1000, token)
      pcall(flagged, q, token)
    else
      lost[#lost + 1] = token
    end
  end
end

-- A queue with a damaged key must not keep the claims of the others from being renewed.
for i, list in ipairs(KEYS) do pcall(renew, queue(list), cmsgpack.unpack(ARGV[i + 1])) end
return { lost, cancelled, expired }
