#!lua flags=allow-oom
-- cancel_queue: ends waiting jobs as cancelled, at most 250 a call.
-- KEYS    1 the queue
-- ARGV    1 {ttl_seconds, failed_ttl_seconds, keep_input, max_kept_bytes}
-- Returns {ended, left}: numbers of jobs; left counts waiting and delayed ones
-- Retry   goes on with the jobs that are left
-- include: keys job_keys time facts waiting stored_bytes waiting_bytes counted_bytes ending

local MAX_JOBS = 250

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
local ends, freed_bytes, read, seen = {}, 0, 0, {}

-- Adds a job that waits to `ends`, as cancelled, and its bytes to `freed_bytes`; does nothing if it
-- does not wait. An external job may wait without a status. The caller takes the id off its list.
local function collect_waiting(id, facts)
  local status = redis.call('MGET', job_key(id, 'status'))[1]
  if status == 'pending' or (not status and stored_bytes(id, 'data') > 0) then
    freed_bytes = freed_bytes + counted_bytes(id)
    ends[#ends + 1] = cancelled_job(id, facts, now)
  end
end

for _, list in ipairs({ q.high, q.list, q.low }) do
  local ids = read < MAX_JOBS and redis.call('LRANGE', list, read - MAX_JOBS, -1) or {}
  if #ids > 0 then
    for i, packed in ipairs(redis.call('HMGET', q.facts, unpack(ids))) do
      if not seen[ids[i]] then collect_waiting(ids[i], decode_table(packed)) end
      seen[ids[i]] = true
    end
    redis.call('LTRIM', list, 0, -#ids - 1)
    update_stale_entries(q, 'SREM', ids)
    read = read + #ids
  end
end
local delayed = read < MAX_JOBS and redis.call('ZRANGE', q.delayed, 0, MAX_JOBS - read - 1) or {}
for _, id in ipairs(delayed) do
  if not seen[id] then collect_waiting(id, decode_table(redis.call('HGET', q.facts, id))) end
  redis.call('ZREM', q.delayed, id)
end
end_jobs(q, ends, args)
adjust_waiting_bytes(q, -freed_bytes)
return { #ends, count_waiting(q) + redis.call('ZCARD', q.delayed) }
