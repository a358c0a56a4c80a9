-- include: fact_names value waiting priority
-- Whether a queue can take a job, and where the job joins it.

-- Whether a queue has nothing but its own list, as nearly always: then fewer keys need be read,
-- and each read costs more than a microsecond.
local function has_only_its_list(q)
  return redis.call('EXISTS', q.high, q.low, q.delayed, q.stale) == 0
end

-- How many more jobs and bytes a queue takes; `only_its_list` if the caller knows that.
local function free_capacity(q, args, only_its_list)
  local count = (only_its_list or has_only_its_list(q)) and redis.call('LLEN', q.list)
    or count_waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.stale)
  local bytes = tonumber(value_at(q.bytes) or 0) or 0
  return args.max_queue - count, args.max_bytes - bytes
end

-- Writes the deadlines and the delay of a new round; `options` are those of `submit`.
-- Returns the list the job joins, or nil if it waits in `delayed`; and its packed facts.
local function place_with_options(q, id, options, now)
  local start_by = options.start_within_ms and now + options.start_within_ms or nil
  local finish_by = options.finish_within_ms and now + options.finish_within_ms or nil
  local facts = {
    [PRIORITY] = options.priority,
    [TTL_SECONDS] = options.ttl_seconds,
    [INBOXES] = options.inbox and { options.inbox } or nil,
    [START_BY_MS] = start_by,
    [FINISH_BY_MS] = finish_by,
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
