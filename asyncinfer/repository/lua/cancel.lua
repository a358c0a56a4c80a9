#!lua flags=allow-oom
-- cancel: ends jobs that wait, and requests the end of those that run.
-- KEYS    1 the queue
-- ARGV    1 {ttl_seconds, failed_ttl_seconds, keep_input, max_kept_bytes}; then per job: id, digest
--         of its idempotency key ("" for none)
-- Returns per job "cancelled" | "stopping" | "absent" | the terminal status it already has
-- Retry   a second call finds the job cancelled and returns that
-- include: keys job_keys time value fact_names facts priority control
-- include: waiting_bytes counted_bytes ending

local MAX_REMOVALS = 10
local MAX_LIST_TO_SEARCH = 10000

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
local verdicts, stale, freed_bytes, removals, has_removed = {}, {}, 0, 0, false

-- Takes a pending job out of the delayed jobs, or else off its list; adds its bytes to
-- `freed_bytes`. LREM walks the list, so only a few per call and in no long list (in one of a
-- million it took 22 ms); the other ids stay as stale entries, which a claim drops.
local function remove_waiting(id, facts)
  has_removed = true
  freed_bytes = freed_bytes + counted_bytes(id)
  if redis.call('ZREM', q.delayed, id) == 1 then return end
  local list = priority_list(q, facts)
  if removals >= MAX_REMOVALS or redis.call('LLEN', list) > MAX_LIST_TO_SEARCH then
    stale[#stale + 1] = id
    return
  end
  removals = removals + 1
  redis.call('LREM', list, -1, id)
end

-- Cancels one job; `digest` is that of its idempotency key, nil for none. Returns cancelled (it has
-- ended), stopping (a claim runs it: its worker is notified, and ends it later), absent, or the
-- status of a job that has already ended.
local function cancel(id, digest)
  local status = value_at(job_key(id, 'status'))
  if not status then return 'absent' end
  if status ~= 'pending' and status ~= 'processing' then return status end
  local facts = decode_table(redis.call('HGET', q.facts, id))
  if status == 'processing' and redis.call('HEXISTS', q.running, id) == 1 then
    facts = facts or {}
    if not facts[CANCEL_REQUESTED] then
      facts[CANCEL_REQUESTED] = 1
      redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
      notify_workers(q, 'cancel', id)
    end
    return 'stopping'
  end
  if status == 'pending' then remove_waiting(id, facts) end
  local ended = cancelled_job(id, facts, now)
  ended.digest = digest
  end_jobs(q, { ended }, args)
  return 'cancelled'
end

for i = 2, #ARGV, 2 do
  verdicts[#verdicts + 1] = cancel(ARGV[i], ARGV[i + 1] ~= '' and ARGV[i + 1] or nil)
end
if has_removed then
  update_stale_entries(q, 'SADD', stale)
  adjust_waiting_bytes(q, -freed_bytes)
end
return verdicts
