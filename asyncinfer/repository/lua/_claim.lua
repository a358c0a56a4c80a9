-- include: keys job_keys fact_names facts doorbell log sequence stored_bytes
-- include: waiting_bytes ending failures
-- The claim itself, shared by `claim` and by `finish`, which claims next in the same step.

-- Returns what a claim does with a job at `now`, in whole ms; writes nothing. `ready` and
-- `exclusive` (redelivered or suspect, so that it is claimed alone) are taken. `input_lost` and
-- `expired` fail, as does `invalid` (not an id) if it is pending. `absent` (neither a status nor a
-- job of an external producer) and `not_pending` (it has another status) are dropped. status and
-- meta are false if Redis has none, facts nil if missing or corrupt, bytes 0 if there is no input.
local function classify(id, status, meta, bytes, facts, now)
  if #id == 0 or #id > 128 or id:find('%c') then return 'invalid' end
  local is_external = not status and not meta
  if status ~= 'pending' and not (is_external and bytes > 0) then
    return status and 'not_pending' or 'absent'
  end
  if bytes == 0 then return 'input_lost' end
  if facts then
    local start_by, finish_by = facts[START_BY_MS], facts[FINISH_BY_MS]
    if (start_by and start_by < now) or (finish_by and finish_by < now) then return 'expired' end
    if facts[DELIVERIES] or facts[SUSPECT] then return 'exclusive' end
  end
  return 'ready'
end

-- The packed facts of jobs, in the order of `ids`, of which there must be at least one: false (or
-- nil) for a job without facts. Where hardly any job has facts, the key itself is mostly absent.
local function packed_facts_of(q, ids)
  local few_ids = 16
  if #ids > few_ids and redis.call('EXISTS', q.facts) == 0 then return {} end
  return redis.call('HMGET', q.facts, unpack(ids))
end

-- What Redis holds of jobs, as lists in the order of `ids`, of which there must be at least one:
-- statuses, metas, packed facts, and inputs; false (or nil) for what it lacks. Reads the inputs if
-- `with_inputs` is true and none of the jobs is external, since the size of such an input is not
-- known before it is read; else `inputs` is nil or false.
local function read_jobs(q, ids, with_inputs)
  local count, names, metas = #ids, {}, {}
  for i, id in ipairs(ids) do
    local prefix = 'job:' .. id
    names[i], names[count + i] = prefix .. ':status', prefix .. ':meta'
  end
  local statuses = redis.call('MGET', unpack(names))
  for i = 1, count do
    metas[i] = statuses[count + i]
    with_inputs = with_inputs and metas[i]
  end
  local packed = packed_facts_of(q, ids)
  return statuses, metas, packed, with_inputs and redis.call('MGET', unpack(job_keys(ids, ':data')))
end

-- Up to `count` ids from the serving end of the list at key `list`, behind the first `skip`; the
-- next to be served comes first. Removes none.
local function next_ids(list, skip, count)
  local ids = redis.call('LRANGE', list, -skip - count, -skip - 1)
  for i = 1, math.floor(#ids / 2) do ids[i], ids[#ids + 1 - i] = ids[#ids + 1 - i], ids[i] end
  return ids
end

-- The tail of a claim's reply as a flat list: id, input, meta and packed facts of each job, false
-- for what it lacks. Takes lists in the order of `ids`; reads the inputs if one is missing.
local function job_fields(ids, inputs, metas, packed)
  local fields = {}
  for i = 1, #ids do
    if not inputs[i] then
      inputs = redis.call('MGET', unpack(job_keys(ids, ':data')))
      break
    end
  end
  for i, id in ipairs(ids) do
    local at = 4 * i - 4
    fields[at + 1], fields[at + 2], fields[at + 3], fields[at + 4] =
      id, inputs[i], metas[i], packed[i] or false
  end
  return fields
end

-- The reply with the claim that `args.token` holds already: a claim whose reply was lost is sent
-- again, and must not take more jobs. `packed_ids` is the value of the claim's key. Leaves out jobs
-- that the claim no longer owns, and lets the lease, if it still exists, end `args.lease_ms` after
-- `now`.
local function return_existing_claim(q, args, now, packed_ids)
  local ids, held = decode_table(packed_ids) or {}, {}
  local tokens = #ids > 0 and redis.call('HMGET', q.running, unpack(ids)) or {}
  for i, id in ipairs(ids) do
    if tokens[i] == args.token then held[#held + 1] = id end
  end
  redis.call('ZADD', q.leases, 'XX', now + args.lease_ms, args.token)
  if #held == 0 then return { now, q.list, 0, false } end
  local _, metas, packed = read_jobs(q, held)
  return { now, q.list, 0, false, unpack(job_fields(held, {}, metas, packed)) }
end

-- Notes in `chosen` what becomes of an id of this class that a claim does not take; `counted` is
-- what its input has of the waiting bytes.
local function set_aside(chosen, id, class, status, counted, facts, now)
  -- A longer id is dropped without an entry in the log, which would have to hold it.
  local max_logged_id_bytes, ends = 1024, chosen.ends
  if class == 'invalid' and status == 'pending' and #id <= max_logged_id_bytes then
    ends[#ends + 1] = failed_job(
      id, 'invalid_id', 'A job id has 1 to 128 bytes and no control characters.', nil, now)
  elseif class == 'input_lost' then
    ends[#ends + 1] = failed_job(
      id, 'input_lost', 'The input is gone from Redis; submit the job again.', facts, now)
  elseif class == 'expired' then
    ends[#ends + 1] = failed_job(
      id, 'expired', 'The deadline passed while the job waited.', facts, now)
    chosen.freed_bytes = chosen.freed_bytes + counted
  elseif class == 'absent' then
    chosen.absent[#chosen.absent + 1] = id
  elseif class == 'not_pending' and status ~= 'processing' then
    chosen.ended[#chosen.ended + 1] = id
  end
end

-- Decides, without a write, what a claim does with the ids at the serving ends of `lists` (keys, in
-- the order served); `first_ids` are the next ones of the first list if the caller has read them,
-- else false. Takes at most `args.max_jobs` jobs and `args.max_bytes` of input, but one job of any
-- size. Returns a table: `ids`, `inputs`, `metas`, `packed` and `decoded` (facts) of the jobs taken,
-- `ends` (for `end_jobs`), `absent` and `ended` (ids to drop), `cuts` ({list, count} of ids to cut
-- off), `bytes` of the inputs taken, `freed_bytes` that no longer wait, and `is_blocked`: the next
-- job must run alone, and this claim has taken others or its process holds another claim.
local function select_jobs(q, args, now, lists, first_ids, with_inputs)
  local chosen = {
    ids = {}, inputs = {}, metas = {}, packed = {}, decoded = {},
    ends = {}, absent = {}, ended = {}, cuts = {}, bytes = 0, freed_bytes = 0,
  }
  local max_skipped, taken, is_full, seen, skipped = 1000, 0, false, {}, 0
  for _, list in ipairs(lists) do
    local cut, is_read = 0, false
    while taken < args.max_jobs and not is_full and not is_read and skipped < max_skipped do
      local wanted = args.max_jobs - taken
      local ids = first_ids or next_ids(list, cut, wanted)
      first_ids = nil
      if #ids == 0 then break end
      is_read = #ids < wanted
      local statuses, metas, packed, inputs = read_jobs(q, ids, with_inputs)
      for i, id in ipairs(ids) do
        local status, meta, facts = statuses[i], metas[i], decode_table(packed[i])
        local bytes = inputs and #(inputs[i] or '') or stored_bytes(id, 'data')
        local class = seen[id] and 'repeated' or classify(id, status, meta, bytes, facts, now)
        if class == 'exclusive' and (taken > 0 or args.is_holding) then
          is_full, chosen.is_blocked = true, true
        end
        if class == 'ready' and taken > 0 and chosen.bytes + bytes > args.max_bytes then
          is_full = true
        end
        if is_full then break end
        cut = cut + 1
        seen[id] = true
        local counted = meta and bytes or 0
        if class == 'ready' or class == 'exclusive' then
          taken = taken + 1
          chosen.ids[taken], chosen.metas[taken], chosen.decoded[taken] = id, meta, facts or false
          chosen.inputs[taken], chosen.packed[taken] = inputs and inputs[i] or false, packed[i] or false
          chosen.bytes = chosen.bytes + bytes
          chosen.freed_bytes = chosen.freed_bytes + counted
          is_full = class == 'exclusive'
          if is_full then break end
        else
          skipped = skipped + 1
          set_aside(chosen, id, class, status, counted, facts, now)
        end
      end
    end
    if cut > 0 then chosen.cuts[#chosen.cuts + 1] = { list = list, count = cut } end
  end
  return chosen
end

-- Removes the start deadline of a job that starts; does nothing if it has none. The finish
-- deadline, if any, takes its place in the deadlines. Returns the job's packed facts, or false.
local function clear_start_deadline(q, id, facts, packed)
  if not (facts and facts[START_BY_MS]) then return packed end
  facts[START_BY_MS] = nil
  redis.call('ZREM', q.deadlines, id)
  if facts[FINISH_BY_MS] then redis.call('ZADD', q.deadlines, facts[FINISH_BY_MS], id) end
  packed = next(facts) and cmsgpack.pack(facts) or false
  if packed then
    redis.call('HSET', q.facts, id, packed)
  else
    redis.call('HDEL', q.facts, id)
  end
  return packed
end

-- Makes the chosen jobs, at least one, running jobs of the claim `args.token`, whose lease ends at
-- `until_ms`, with fraction; counts external jobs in the queue's sequence on their first claim, and
-- adds all to the log. Does not cut them off their lists.
local function lease_jobs(q, args, chosen, until_ms)
  local ids, statuses, owners, new_external = chosen.ids, {}, {}, {}
  for i, id in ipairs(ids) do
    local facts = chosen.decoded[i]
    statuses[2 * i - 1], statuses[2 * i] = 'job:' .. id .. ':status', 'processing'
    owners[2 * i - 1], owners[2 * i] = id, args.token
    if not chosen.metas[i] then
      local was_claimed = facts and (facts[DELIVERIES] or facts[SUSPECT] or facts[CLAIMED_BEFORE])
      if not was_claimed then new_external[#new_external + 1] = id end
    end
    if facts then chosen.packed[i] = clear_start_deadline(q, id, facts, chosen.packed[i]) end
  end
  redis.call('MSET', q['claim:' .. args.token], cmsgpack.pack(ids), unpack(statuses))
  redis.call('HSET', q.running, unpack(owners))
  redis.call('ZADD', q.leases, until_ms, args.token)
  if #new_external > 0 then advance_sequence(q, #new_external) end
  -- External jobs are not submitted here; the log shows them first under `stranger`.
  log_transitions(q, { processing = ids, stranger = new_external })
end

-- Claims jobs of one queue, which must not be paused, under one lease; ends or drops ids found
-- there that cannot run, and rings the doorbell if jobs are left. `now` is in whole ms, `exact_now`
-- with fraction; `waiting_bytes` is the value of the queue's number of waiting bytes, or false.
-- Returns {now, queue, blocked, failures, id, data, meta, facts, ...}, with no id if nothing was
-- claimed, as always after `args.not_after_ms`. failures: as `failures_of` returns them.
local function claim_from(q, args, now, exact_now, waiting_bytes)
  if now > args.not_after_ms or args.max_jobs < 1 then return { now, q.list, 0, false } end
  local keys = redis.call('EXISTS', q.list, q.high, q.low, q.delayed, q.stale)
  if keys == 0 then return { now, q.list, 0, false } end
  local ids = next_ids(q.list, 0, args.max_jobs)
  if #ids == 0 and redis.call('EXISTS', q.high, q.low) == 0 then return { now, q.list, 0, false } end
  -- Nearly always so: no other waiting jobs, delayed jobs or stale entries.
  local only_its_list = keys == 1 and #ids > 0
  local lists = only_its_list and { q.list }
    or args.low_first and { q.low, q.list, q.high } or { q.high, q.list, q.low }
  local with_inputs = (tonumber(waiting_bytes or 0) or 0) <= args.max_bytes
  local chosen = select_jobs(q, args, now, lists, only_its_list and ids, with_inputs)
  local cuts = chosen.cuts
  for _, cut in ipairs(cuts) do redis.call('LTRIM', cut.list, 0, -cut.count - 1) end
  -- To the microsecond, so that claims of the same ms keep their order when they are reaped.
  if #chosen.ids > 0 then lease_jobs(q, args, chosen, exact_now + args.lease_ms) end
  end_jobs(q, chosen.ends, args)
  if #chosen.absent > 0 then
    redis.call('HDEL', q.facts, unpack(chosen.absent))
    redis.call('ZREM', q.deadlines, unpack(chosen.absent))
  end
  update_stale_entries(q, 'SREM', chosen.absent)
  update_stale_entries(q, 'SREM', chosen.ended)
  local left
  if #cuts > 0 then
    -- Fewer ids than were wanted are all that the list had.
    local count = only_its_list
      and (#ids < args.max_jobs and #ids - cuts[1].count or redis.call('LLEN', q.list))
    left = adjust_waiting_bytes(q, -chosen.freed_bytes, count)
  end
  if chosen.is_blocked or (left and left > 0) then
    ring_doorbell(q)
  elseif left and not only_its_list then
    -- A token left over would only make a worker look in vain.
    redis.call('DEL', q.wake)
  end
  local fields = job_fields(chosen.ids, chosen.inputs, chosen.metas, chosen.packed)
  local failures = #chosen.ends > 0 and failures_of(q, { chosen.ends })
  return { now, q.list, chosen.is_blocked and 1 or 0, failures, unpack(fields) }
end

-- Claims from the first of several queues (list keys) that has a job; paused ones are passed over.
-- A claim that the token already holds in one of them is returned instead. `args` is the ARGV 1 of
-- `claim`, `now` in whole ms, `exact_now` with fraction. Returns {now, queue, blocked,
-- failures, id, data, meta, facts, ...}; if nothing was claimed, without an id and with the queue
-- looked at last. blocked is 1 or 0; 1: the next job must run alone, and this process holds another
-- claim or takes other jobs by this one, so that it gets neither that job nor any behind it or in a
-- later queue. failures: a list with what `failures_of` returns of each queue, or false.
local function claim_from_any(queues, args, now, exact_now)
  local qs, names = {}, {}
  for i, list in ipairs(queues) do
    local q = queue(list)
    qs[i] = q
    names[3 * i - 2], names[3 * i - 1], names[3 * i] = q['claim:' .. args.token], q.paused, q.bytes
  end
  local values = redis.call('MGET', unpack(names))
  -- Every queue before any claim: the call that is sent again may have claimed from the last one.
  for i, q in ipairs(qs) do
    local packed_ids = values[3 * i - 2]
    if packed_ids then return return_existing_claim(q, args, now, packed_ids) end
  end
  local reply, failures = nil, {}
  local max_jobs, max_jobs_of = args.max_jobs, args.max_jobs_of or {}
  for i, q in ipairs(qs) do
    local is_paused, waiting_bytes = values[3 * i - 1], values[3 * i]
    args.max_jobs = max_jobs_of[q.list] or max_jobs
    reply = is_paused and { now, q.list, 0, false }
      or claim_from(q, args, now, exact_now, waiting_bytes)
    if reply[4] then failures[#failures + 1] = reply[4] end
    if #reply > 4 or reply[3] == 1 then break end
  end
  reply[4] = #failures > 0 and failures
  return reply
end
