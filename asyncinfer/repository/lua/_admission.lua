-- include: fact_names waiting priority
-- Whether a queue can take a job, and where the job joins it.

-- Whether a queue has no jobs of high or low priority, no delayed jobs and no stale entries; its
-- own list may have any number of jobs. Nearly always so: then fewer keys need be read, and each
-- read costs more than a microsecond.
local function has_only_its_list(q)
  return redis.call('EXISTS', q.high, q.low, q.delayed, q.stale) == 0
end

-- Returns how many more jobs and how many more bytes of input a queue takes, and how many more
-- bytes its ended jobs may keep; each may be negative. `args` holds max_queue, max_bytes and
-- max_kept_bytes, the queue's bounds, as ARGV 1 of `submit` does. Waiting and delayed jobs use up
-- capacity, running jobs and stale entries do not. `only_its_list` is true if the caller knows that
-- `has_only_its_list`; if it is false or nil, this is read.
local function free_capacity(q, args, only_its_list)
  local count = (only_its_list or has_only_its_list(q)) and redis.call('LLEN', q.list)
    or count_waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.stale)
  local sums = redis.call('MGET', q.bytes, q.keptbytes)
  return args.max_queue - count, args.max_bytes - (tonumber(sums[1] or 0) or 0),
    args.max_kept_bytes - (tonumber(sums[2] or 0) or 0)
end

-- Writes the deadline and the delay of a job's new round, which begins at `now`, in ms; `options`
-- are those of `submit`, unpacked (`now` may be false if none of them is a time). Returns the key
-- of the list that the caller then pushes the id to, nil if the job is delayed; and the packed
-- facts that the caller then writes, nil if there are none.
local function place_with_options(q, id, options, now)
  local start_by = options.start_within_ms and now + options.start_within_ms or nil
  local finish_by = options.finish_within_ms and now + options.finish_within_ms or nil
  local facts = {
    [PRIORITY] = options.priority,
    [TTL_SECONDS] = options.ttl_seconds,
    [INBOXES] = options.inbox and { options.inbox } or nil,
    [START_BY_MS] = start_by,
    [FINISH_BY_MS] = finish_by,
    -- Whoever ends the job at its deadline does not read its record.
    [IDEMPOTENCY_DIGEST] = (start_by or finish_by) and options.idempotency_key or nil,
    [WEBHOOK_EVENTS] = options.webhook_events,
    [WEBHOOK_ROUND] = options.webhook_round,
  }
  local packed = next(facts) and cmsgpack.pack(facts) or nil
  if start_by or finish_by then
    redis.call('ZADD', q.deadlines, math.min(start_by or math.huge, finish_by or math.huge), id)
  end
  if options.delay_ms then
    redis.call('ZADD', q.delayed, now + options.delay_ms, id)
    return nil, packed
  end
  return priority_list(q, facts), packed
end
