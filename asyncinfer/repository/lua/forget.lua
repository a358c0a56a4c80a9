#!lua flags=allow-oom
-- forget: deletes ended jobs, with all that is kept of them.
-- KEYS    1 the queue
-- ARGV    1 {}; then per job: id, digest of its idempotency key ("" for none), "1" if it has a
--         webhook, else ""
-- Returns per job "forgotten" | "absent" | the status of a job that has not ended, which is left
-- Order   one step, so that a job that is retried meanwhile keeps its input
-- Retry   a second call finds the job absent
-- include: keys job_keys kept_release idempotency webhook_release
-- include: webhook_deliveries

local TERMINAL = { completed = true, failed = true, cancelled = true }
local WORDS = { 'data', 'status', 'result', 'error', 'meta' }

local q, names, ids, verdicts, seen, owners = queue(KEYS[1]), {}, {}, {}, {}, {}

-- Returns what becomes of a job: forgotten (the caller deletes it, and notes the id in `seen`),
-- absent (there is no such job, or its id is in `seen`), or the status of one that has not ended,
-- which may be any bytes of an external producer. Changes nothing.
local function verdict_of(id)
  local status = redis.call('MGET', job_key(id, 'status'))[1]
  if not status or seen[id] then return 'absent' end
  return TERMINAL[status] and 'forgotten' or status
end

-- Deletes what is to be delivered of a job, what was, and what is reserved for it.
local function forget_webhook(id)
  local open, done = deliveries_of(q, id)
  for _, fields in ipairs({ open, done }) do
    for _, field in ipairs(fields) do
      redis.pcall('ZREM', q.outbox, id .. '_' .. field)
      redis.pcall('ZREM', q.undelivered, id .. '_' .. field)
      release_webhook(q, id .. '_' .. field:match('^%d+'))
    end
  end
  names[#names + 1] = q['webhook:' .. id]
end

for i = 2, #ARGV, 3 do
  local id, digest, has_webhook = ARGV[i], ARGV[i + 1], ARGV[i + 2] ~= ''
  local verdict = verdict_of(id)
  if verdict == 'forgotten' then
    ids[#ids + 1], seen[id] = id, true
    give_back_kept_bytes(q, id)
    for _, word in ipairs(WORDS) do names[#names + 1] = job_key(id, word) end
    if has_webhook then forget_webhook(id) end
    if digest ~= '' then owners[#owners + 1] = { id = id, digest = digest } end
  end
  verdicts[#verdicts + 1] = verdict
end
if #owners > 0 then
  for _, name in ipairs(own_idempotency_keys(q, owners)) do
    if name then names[#names + 1] = name end
  end
end
if #ids > 0 then
  -- A stale entry of the job stays counted until a claim drops its id.
  redis.call('UNLINK', unpack(names))
  redis.call('ZREM', q.dead, unpack(ids))
end
return verdicts
