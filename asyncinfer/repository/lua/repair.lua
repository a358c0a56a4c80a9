#!lua flags=allow-oom
-- repair: puts back jobs that two passes found out of place, and deletes the facts of ended jobs.
-- KEYS    1 the queue, 2 the zset of ids found out of place once
-- ARGV    1 {pause_ms, ttl_ms} the pause between the two passes, the TTL of the zset; then ids
--         that looked out of place
-- Returns {put back, out of place but not put back yet}: numbers of jobs
-- include: keys job_keys time value facts doorbell log waiting_bytes counted_bytes redelivery

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
local out_of_place = KEYS[2]

-- True if a job waits: in one of the queue's three lists, or delayed; else false. Walks the lists.
local function is_in_a_list(id)
  for _, list in ipairs({ q.list, q.high, q.low }) do
    if redis.call('LPOS', list, id) then return true end
  end
  return redis.call('ZSCORE', q.delayed, id) ~= false
end

-- Whether the claim that owns a job has a lease, even one that has ended; returns false, or the end
-- of the lease as a string.
local function is_in_a_claim(id)
  local token = redis.call('HGET', q.running, id)
  return token and redis.call('ZSCORE', q.leases, token)
end

-- True if a job has the status processing but is in no claim, or pending but in no list. `since`
-- is when it was first found so, nil on the first pass, which relies on the caller's look at the
-- lists (LPOS walks them). Deletes the facts of a job of any other status; `facts` is nil if it has
-- none.
local function is_out_of_place(id, facts, since)
  local status = value_at(job_key(id, 'status'))
  if status == 'processing' then return not is_in_a_claim(id) end
  if status == 'pending' then return not (since and is_in_a_list(id)) end
  if facts then redis.call('HDEL', q.facts, id) end
  return false
end

-- The bytes of a job that left a list by another way than a script are still counted, unless the
-- queue has been empty since.
adjust_waiting_bytes(q, 0)
local is_uncounted = redis.call('EXISTS', q.bytes) == 0
local back, waits, added_bytes = {}, 0, 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local facts = decode_table(redis.call('HGET', q.facts, id))
  local since = tonumber(redis.call('ZSCORE', out_of_place, id))
  if not is_out_of_place(id, facts, since) then
    redis.call('ZREM', out_of_place, id)
  elseif since and now - since >= args.pause_ms then
    redis.call('ZREM', out_of_place, id)
    put_back(q, id, facts)
    if is_uncounted then added_bytes = added_bytes + counted_bytes(id) end
    back[#back + 1] = id
  else
    redis.call('ZADD', out_of_place, 'NX', now, id)
    waits = waits + 1
  end
end
if waits > 0 then redis.call('PEXPIRE', out_of_place, args.ttl_ms) end
if #back > 0 then
  adjust_waiting_bytes(q, added_bytes)
  log_transitions(q, { pending = back })
  ring_doorbell(q)
end
return { #back, waits }
