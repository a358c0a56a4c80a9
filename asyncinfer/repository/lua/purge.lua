#!lua flags=allow-oom
-- purge: ends waiting jobs as cancelled, at most 250 a call.
-- KEYS    1 the queue
-- ARGV    1 {ttl, failed_ttl}
-- Returns {ended, left}
-- Retry   goes on with what is left

local MOST = 250

local q, a = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local ends, freed, looked, seen = {}, 0, 0, {}

-- A stranger's job may wait without a status.
local function end_waiting(id, facts)
  local status = redis.call('MGET', job(id, 'status'))[1]
  if status == 'pending' or (not status and input_bytes(id) > 0) then
    freed = freed + counted_bytes(id)
    ends[#ends + 1] = { id = id, status = 'cancelled', facts = facts }
  end
end

for _, list in ipairs({ q.high, q.list, q.low }) do
  local ids = looked < MOST and redis.call('LRANGE', list, looked - MOST, -1) or {}
  if #ids > 0 then
    for i, packed in ipairs(redis.call('HMGET', q.facts, unpack(ids))) do
      if not seen[ids[i]] then end_waiting(ids[i], unpacked(packed)) end
      seen[ids[i]] = true
    end
    redis.call('LTRIM', list, 0, -#ids - 1)
    haunt(q, ids, false)
    looked = looked + #ids
  end
end
local delayed = looked < MOST and redis.call('ZRANGE', q.delayed, 0, MOST - looked - 1) or {}
for _, id in ipairs(delayed) do
  if not seen[id] then end_waiting(id, unpacked(redis.call('HGET', q.facts, id))) end
  redis.call('ZREM', q.delayed, id)
end
terminal(q, ends, a)
settle(q, -freed)
return { #ends, waiting(q) + redis.call('ZCARD', q.delayed) }
