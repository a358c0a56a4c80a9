#!lua
-- submit: takes new jobs into one queue, each whole or not at all.
-- KEYS    1 queue, 2 the set of all queues
-- ARGV    1 {max_queue, max_bytes, max_kept_bytes, idempotency_ttl_seconds, max_webhooks,
--         max_webhook_bytes, default_queue}: max_webhooks and max_webhook_bytes only if a job has a
--         webhook; default_queue, the list of the default model, only to find out without a job
--         whether this user has all rights; then per job: id, data, meta without seq, options: "" or
--         {idempotency_key (its digest) and fingerprint, priority, ttl_seconds, inbox, group (the
--         list of its ids), start_within_ms, finish_within_ms, delay_ms, webhook_events (the sum of
--         1 for completed, 2 for failed, 4 for cancelled), webhook_round (none for 1), webhook_bytes
--         (to reserve), webhook_target}
-- Returns per job "ok" | "exists" | "closed": its group takes no more jobs | "full" | "kept_full":
--         ended jobs keep max_kept_bytes | "webhooks_full" | {"dup", job_id, fingerprint}
-- Order   the idempotency key is checked before the id, the id before the group, the group before
--         the capacity. No allow-oom: with memory full a submit is refused whole.
-- include: keys job_keys time value doorbell log sequence waiting admission groups
-- include: closed_group webhook_room webhook_expect

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local verdicts, by_id, by_key, closed_groups = {}, {}, {}, {}
-- Of each job that is taken: where it begins in ARGV, and its options (false for none).
local taken, places, options_of = 0, {}, {}

-- Ids are new unless a call is sent again, and a queue mostly has nothing but its own list; so
-- nearly always one EXISTS answers for all of that.
local statuses = {}
for i = 2, #ARGV, 4 do statuses[(i + 2) / 4] = job_key(ARGV[i], 'status') end
local is_usual = redis.call('EXISTS', q.high, q.low, q.delayed, q.stale, unpack(statuses)) == 0
local all_new = is_usual or redis.call('EXISTS', unpack(statuses)) == 0
local free, free_bytes, free_kept_bytes = free_capacity(q, args, is_usual)
local room = webhook_room(q, args)

-- True if the id is taken, by an earlier job of this call or by one in Redis; else false.
local function exists(id)
  return by_id[id] or (not all_new and redis.call('EXISTS', job_key(id, 'status')) == 1)
end

-- The verdict {"dup", job_id, fingerprint} if a job has this idempotency key already, in Redis or
-- earlier in this call; nil if none has, or it is gone. `key` is the digest of the idempotency key,
-- `fingerprint` the one of that job.
local function duplicate(key)
  local value = by_key[key] or value_at(q['idem:' .. key])
  if not value then return nil end
  local id, fingerprint = value:match('^(%S+) (%S*)$')
  if not id then return nil end
  if by_id[id] or redis.call('EXISTS', job_key(id, 'status')) == 1 then
    return { 'dup', id, fingerprint }
  end
end

-- Returns the verdict on a new job: ok, exists, closed, full, kept_full, webhooks_full, or a table
-- that names an earlier job (see `duplicate`); stores nothing, but takes from `room` what an ok job
-- needs. `options` are unpacked or nil, `size` is the bytes of the input.
local function verdict_of(id, options, size)
  local dup = options and options.idempotency_key and duplicate(options.idempotency_key)
  if dup then return dup end
  if exists(id) then return 'exists' end
  if options and options.group and is_closed(closed_groups, options.group) then return 'closed' end
  if free_kept_bytes <= 0 then return 'kept_full' end
  if free < 1 or free_bytes < size then return 'full' end
  if room and options and options.webhook_events
    and not take_webhook_room(room, options.webhook_bytes) then
    return 'webhooks_full'
  end
  return 'ok'
end

-- Appends ids, at least one, to a group's list (its key). A full group drops its oldest ids: it
-- serves reading, and refuses no job.
local function add_to_group(list, ids)
  local max_jobs = 1000000
  if redis.call('RPUSH', list, unpack(ids)) > max_jobs then
    redis.call('LTRIM', list, -max_jobs, -1)
  end
  keep_group(list)
end

local accepted_bytes = 0
for i = 2, #ARGV, 4 do
  local id, data, options = ARGV[i], ARGV[i + 1], ARGV[i + 3]
  options = options ~= '' and cmsgpack.unpack(options) or nil
  local verdict = verdict_of(id, options, #data)
  if verdict == 'ok' then
    by_id[id] = true
    if options and options.idempotency_key then
      by_key[options.idempotency_key] = id .. ' ' .. options.fingerprint
    end
    free, free_bytes = free - 1, free_bytes - #data
    accepted_bytes = accepted_bytes + #data
    taken = taken + 1
    places[taken], options_of[taken] = i, options or false
  end
  verdicts[(i + 2) / 4] = verdict
end
if args.default_queue then
  -- Whatever a submit may call, on a key of each kind: by the first call that this user may not make
  -- the server itself refuses the script. Nothing is written, so nothing is replicated.
  local lists, key = { KEYS[1], args.default_queue }, job_key(ARGV[2], 'data')
  local calls = {
    { 'TIME' }, { 'HLEN', key }, { 'HMGET', key, '' }, { 'HVALS', key }, { 'SCARD', key },
    { 'ZCARD', key }, { 'MSET', key, '' }, { 'SET', key, '' }, { 'DEL', key }, { 'EXPIRE', key, 1 },
    { 'PERSIST', key }, { 'HSET', key, '', '' }, { 'LPUSH', key, '' }, { 'RPUSH', key, '' },
    { 'LTRIM', key, 0, -1 }, { 'SADD', key, '' }, { 'ZADD', key, 0, '' },
    { 'XADD', key, '*', '', '' }, { 'INCRBY', key, 0 }, { 'INCRBY', KEYS[2], 0 },
  }
  for _, list in ipairs(lists) do
    calls[#calls + 1], calls[#calls + 2] = { 'INCRBY', list, 0 }, { 'INCRBY', queue(list).seq, 0 }
  end
  for _, call in ipairs(calls) do
    if not redis.acl_check_cmd(unpack(call)) then redis.call(unpack(call)) end
  end
end
if taken == 0 then return verdicts end

local seq = advance_sequence(q, taken) - taken
local values, ids = {}, {}
for k, i in ipairs(places) do
  local id, n = ARGV[i], 6 * k - 6
  ids[k] = id
  values[n + 1], values[n + 2] = job_key(id, 'data'), ARGV[i + 1]
  values[n + 3], values[n + 4] = statuses[(i + 2) / 4], 'pending'
  values[n + 5], values[n + 6] = job_key(id, 'meta'), struct.pack('>I8', seq + k) .. ARGV[i + 2]
end
redis.call('MSET', unpack(values))
local joins, packed_facts, groups, expected, now = {}, {}, {}, room and {}, nil
for k, id in ipairs(ids) do
  local list, packed, options = q.list, nil, options_of[k]
  if options then
    local key, group = options.idempotency_key, options.group
    if key then
      redis.call('SET', q['idem:' .. key], by_key[key], 'EX', args.idempotency_ttl_seconds)
    end
    if group then
      local added = groups[group] or {}
      groups[group] = added
      added[#added + 1] = id
    end
    local is_timed = options.start_within_ms or options.finish_within_ms or options.delay_ms
    now = now or (is_timed and now_ms())
    list, packed = place_with_options(q, id, options, now)
    if expected and options.webhook_events then expected[#expected + 1] = { id = id, options = options } end
  end
  if packed then
    packed_facts[#packed_facts + 1], packed_facts[#packed_facts + 2] = id, packed
  end
  if list then
    local joining = joins[list] or {}
    joins[list] = joining
    joining[#joining + 1] = id
  end
end
if #packed_facts > 0 then redis.call('HSET', q.facts, unpack(packed_facts)) end
if expected and #expected > 0 then expect_webhooks(q, expected) end
for list, joining in pairs(joins) do redis.call('LPUSH', list, unpack(joining)) end
for list, added in pairs(groups) do add_to_group(list, added) end
add_waiting_bytes(q, accepted_bytes)
redis.call('SADD', KEYS[2], q.list)
log_transitions(q, { submitted = ids })
if next(joins) then ring_doorbell(q) end
return verdicts
