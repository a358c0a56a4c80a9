#!lua
-- submit: takes new jobs into one queue, each whole or not at all.
-- KEYS    1 queue, 2 the set of all queues
-- ARGV    1 {max_queue, max_bytes, idem_ttl}; then per job: id, data, meta without seq,
--         extra: "" or {k, f: idempotency digest and fingerprint; p priority; t ttl in s;
--         w inbox; g list of its group's ids; b, l: start and life deadline, y: delay, in ms from now}
-- Returns per job "ok" | "exists" | "full" | {"dup", job_id, fingerprint}
-- Order   the idempotency key before the id before the room. No allow-oom: with memory full
--         a submit is refused whole.

local GROUP_JOBS = 1000000
local GROUP_SECONDS = 7 * 24 * 3600

local q, a = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local jobs, verdicts, by_id, by_key = {}, {}, {}, {}

-- Ids are new but when a call is sent again, and a queue has its own list only but at times; so
-- one look for all of that mostly does.
local statuses = {}
for i = 2, #ARGV, 4 do statuses[#statuses + 1] = job(ARGV[i], 'status') end
local is_usual = redis.call('EXISTS', q.high, q.low, q.delayed, q.ghosts, unpack(statuses)) == 0
local all_new = is_usual or redis.call('EXISTS', unpack(statuses)) == 0

local function exists(id)
  return by_id[id] or (not all_new and redis.call('EXISTS', job(id, 'status')) == 1)
end

-- The job an idempotency key stands for; one that is gone stands for nothing.
local function known(key)
  local value = by_key[key] or value_at(q['idem:' .. key])
  if not value then return nil end
  local id, fingerprint = value:match('^(%S+) (%S*)$')
  if not id then return nil end
  if by_id[id] or redis.call('EXISTS', job(id, 'status')) == 1 then
    return { 'dup', id, fingerprint }
  end
end

local function judge(id, extra, size, free, free_bytes)
  local dup = extra and extra.k and known(extra.k)
  if dup then return dup end
  if exists(id) then return 'exists' end
  if free < 1 or free_bytes < size then return 'full' end
  return 'ok'
end

-- A group that is full forgets its oldest: it is there to be looked at, and refuses no job.
local function gather(list, members)
  if redis.call('RPUSH', list, unpack(members)) > GROUP_JOBS then
    redis.call('LTRIM', list, -GROUP_JOBS, -1)
  end
  redis.call('EXPIRE', list, GROUP_SECONDS)
end

local free, free_bytes = room(q, a, is_usual)
local accepted_bytes = 0
for i = 2, #ARGV, 4 do
  local id, data, extra = ARGV[i], ARGV[i + 1], ARGV[i + 3]
  extra = extra ~= '' and cmsgpack.unpack(extra) or nil
  local verdict = judge(id, extra, #data, free, free_bytes)
  if verdict == 'ok' then
    by_id[id] = true
    if extra and extra.k then by_key[extra.k] = id .. ' ' .. extra.f end
    free, free_bytes = free - 1, free_bytes - #data
    accepted_bytes = accepted_bytes + #data
    jobs[#jobs + 1] = { id = id, data = data, meta = ARGV[i + 2], extra = extra }
  end
  verdicts[#verdicts + 1] = verdict
end
if #jobs == 0 then return verdicts end

local seq = count_jobs(q, #jobs) - #jobs
local keys, ids, joins = {}, {}, {}
for i, new in ipairs(jobs) do
  local id = new.id
  ids[i] = id
  keys[#keys + 1], keys[#keys + 2] = job(id, 'data'), new.data
  keys[#keys + 1], keys[#keys + 2] = job(id, 'status'), 'pending'
  keys[#keys + 1], keys[#keys + 2] = job(id, 'meta'), struct.pack('>I8', seq + i) .. new.meta
end
redis.call('MSET', unpack(keys))
local facts, groups, now = {}, {}, nil
for _, new in ipairs(jobs) do
  local extra = new.extra
  if extra and extra.k then
    redis.call('SET', q['idem:' .. extra.k], by_key[extra.k], 'EX', a.idem_ttl)
  end
  if extra and extra.g then
    groups[extra.g] = groups[extra.g] or {}
    table.insert(groups[extra.g], new.id)
  end
  local list, packed = q.list, nil
  if extra then
    now = now or ((extra.b or extra.l or extra.y) and now_ms())
    list, packed = arrange(q, new.id, extra, now)
  end
  if packed then facts[#facts + 1], facts[#facts + 2] = new.id, packed end
  if list then
    joins[list] = joins[list] or {}
    table.insert(joins[list], new.id)
  end
end
if #facts > 0 then redis.call('HSET', q.facts, unpack(facts)) end
for list, members in pairs(joins) do redis.call('LPUSH', list, unpack(members)) end
for list, members in pairs(groups) do gather(list, members) end
count_bytes(q, accepted_bytes)
redis.call('SADD', KEYS[2], q.list)
record(q, { submitted = ids })
if next(joins) then ring(q) end
return verdicts
