#!lua flags=allow-oom
-- retry: opens a new round of failed or cancelled jobs.
-- KEYS    1 the queue, 2 the set of all queues
-- ARGV    1 {max_queue, max_bytes, max_kept_bytes, idempotency_ttl_seconds, max_webhooks,
--         max_webhook_bytes} the last two only if a job has a webhook; then per job: id, the meta it
--         must still have, the meta of the new round ("" for an external job), options as in submit
-- Returns per job "ok" | "changed" | "full" | "webhooks_full" | "no_input" | "not_retryable" | "absent"
-- Retry   the verdict is changed; the caller reads the record again and finds its new round
-- include: keys job_keys time value fact_names priority doorbell log stored_bytes
-- include: waiting_bytes admission kept_release idempotency
-- include: webhook_room webhook_expect

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
local MAX_WEBHOOK_FIELDS = 64

local free, free_bytes = free_capacity(q, args)
local room = webhook_room(q, args)
local verdicts, opened, added_bytes = {}, {}, 0

-- Takes the room for the webhook of a new round; returns false if there is too little, also beside
-- what earlier rounds of the job have left to deliver. True for a job without one.
local function has_webhook_room(id, options)
  if not room or not options or not options.webhook_events then return true end
  local fields = tonumber(redis.pcall('HLEN', q['webhook:' .. id])) or 0
  return fields < MAX_WEBHOOK_FIELDS and take_webhook_room(room, options.webhook_bytes)
end

-- Returns the verdict on a job, and only for `ok` also the bytes of its input; changes nothing, but
-- takes from `room` what an ok job needs. `expected_meta` is the meta that the caller has read ('' for
-- none): another one means that the job has been retried meanwhile, `changed`. `options` are unpacked
-- or nil.
local function verdict_of(id, expected_meta, options)
  local status = value_at(job_key(id, 'status'))
  if not status then return 'absent' end
  if (value_at(job_key(id, 'meta')) or '') ~= expected_meta then return 'changed' end
  if status ~= 'failed' and status ~= 'cancelled' then return 'not_retryable' end
  local size = stored_bytes(id, 'data')
  if size == 0 then return 'no_input' end
  if free < 1 or free_bytes < size then return 'full' end
  if not has_webhook_room(id, options) then return 'webhooks_full' end
  return 'ok', size
end

-- Removes the stale entry of a job's last round, if there is one: still in its list, it would now
-- be the same job a second time. `options` are unpacked or nil; the priority of a job does not
-- change with its rounds.
local function remove_stale_entry(id, options)
  if redis.call('SREM', q.stale, id) == 1 then
    local facts = options and { [PRIORITY] = options.priority }
    redis.call('LREM', priority_list(q, facts), -1, id)
  end
end

-- Starts a new round of a job: removes its outcome, makes it pending and puts it into its list, or
-- delays it. `meta` is the new record, '' for an external job; `options` are unpacked or nil;
-- `size` is the bytes of the input. Adds to `opened` and, unless it is external, to `added_bytes`.
local function open_round(id, meta, options, size)
  give_back_kept_bytes(q, id)
  redis.call('PERSIST', job_key(id, 'data'))
  redis.call('DEL', job_key(id, 'result'), job_key(id, 'error'))
  redis.call('SET', job_key(id, 'status'), 'pending')
  if meta ~= '' then
    redis.call('SET', job_key(id, 'meta'), meta)
    added_bytes = added_bytes + size
  end
  redis.call('ZREM', q.dead, id)
  remove_stale_entry(id, options)
  if meta == '' then redis.call('HSET', q.facts, id, cmsgpack.pack({ [CLAIMED_BEFORE] = 1 })) end
  local list, packed = q.list, nil
  if options then list, packed = place_with_options(q, id, options, now) end
  if options and options.webhook_events then
    expect_webhooks(q, { { id = id, options = options } })
  end
  local digest = options and options.idempotency_key
  if digest then
    local owner = { id = id, digest = digest, ttl = args.idempotency_ttl_seconds }
    expire_idempotency_keys(q, { owner })
  end
  if packed then redis.call('HSET', q.facts, id, packed) end
  if list then redis.call('LPUSH', list, id) end
  opened[#opened + 1] = id
end

for i = 2, #ARGV, 4 do
  local options = ARGV[i + 3] ~= '' and cmsgpack.unpack(ARGV[i + 3]) or nil
  local verdict, size = verdict_of(ARGV[i], ARGV[i + 1], options)
  if verdict == 'ok' then
    open_round(ARGV[i], ARGV[i + 2], options, size)
    free, free_bytes = free - 1, free_bytes - size
  end
  verdicts[#verdicts + 1] = verdict
end
if #opened > 0 then
  adjust_waiting_bytes(q, added_bytes)
  redis.call('SADD', KEYS[2], q.list)
  log_transitions(q, { pending = opened })
  ring_doorbell(q)
end
return verdicts
