#!lua flags=allow-oom
-- reap: one sweep of the queues: expired claims, due jobs, passed deadlines, bounds.
-- KEYS    queues
-- ARGV    1 {tick_ms, lease_ms, max_deliveries, max_dead_letters, dead_letter_ms, ttl_seconds,
--         failed_ttl_seconds, keep_input, max_kept_bytes, log_jobs, is_continued}
--         is_continued: go on past the gate with what the last call left
-- Returns per queue nil (swept lately) or {put back, dead, promoted, expired, ended, more,
--         failures}, or the error that kept it from being swept. Numbers of jobs; ended: of expired
--         claims, the dead ones included; more is 1 if something is left to do, else 0; failures:
--         the dead and the expired jobs, or nil
-- Order   the outage check before the claims: after a gap no job is taken from a worker for the
--         time of one lease
-- include: keys job_keys time value fact_names facts priority doorbell log control
-- include: waiting_bytes counted_bytes ending redelivery dead_letters failures

local MAX_JOBS = 1000
local LOG_MARKS = 10

local args, now = cmsgpack.unpack(ARGV[1]), now_ms()

-- Notes the time of this sweep. A gap since the last sweep (an outage, a jump of the clock, no
-- living process) says nothing about the workers, who could not renew either: no claim is reaped
-- for the time of one lease, while q.hold exists. A lease that ends more than two leases from now,
-- as after a jump of the clock, ends one lease from now instead. Returns the time of the last sweep
-- in ms, nil if that is not known.
local function check_for_outage(q)
  local last = tonumber(value_at(q.swept))
  redis.call('SET', q.swept, now, 'PX', 2 * args.lease_ms)
  if not last or last > now or now - last > args.lease_ms / 2 then
    redis.call('SET', q.hold, '1', 'PX', args.lease_ms)
  end
  local too_far = now + 2 * args.lease_ms
  for _, token in ipairs(redis.call('ZRANGEBYSCORE', q.leases, too_far, '+inf')) do
    redis.call('ZADD', q.leases, now + args.lease_ms, token)
  end
  return last
end

-- Drops the counts of kept bytes of all minutes before `minute`, and makes the sum of the others
-- anew. There may be a count for each minute of the longest TTL: 40,000 of them take some 80 ms.
local function recount_kept_bytes(q, minute)
  local counts, sum, over, fields_per_command = redis.pcall('HGETALL', q.kept), 0, {}, 1000
  for i = 1, #counts, 2 do
    local bytes = tonumber(counts[i + 1]) or 0
    if bytes > 0 and (tonumber(counts[i]) or 0) >= minute then
      sum = sum + bytes
    else
      over[#over + 1] = counts[i]
    end
  end
  for first = 1, #over, fields_per_command do
    redis.call('HDEL', q.kept, unpack(over, first, math.min(first + fields_per_command - 1, #over)))
  end
  if sum > 0 then redis.call('SET', q.keptbytes, sum) else redis.call('DEL', q.keptbytes) end
end

-- Drops the counts of kept bytes whose minute is over since `last`, the time of the last sweep in
-- ms. Counts anew if that is nil, as after an outage, or long ago, and if the sum is damaged.
local function drop_expired_kept_bytes(q, last)
  local max_minutes, minute, over = 100, math.floor(now / 60000), {}
  local first = last and math.floor(last / 60000) or 0
  if first >= minute then return end
  local sum = tonumber(value_at(q.keptbytes))
  if not sum or minute - first > max_minutes then return recount_kept_bytes(q, minute) end
  for past = first, minute - 1 do over[#over + 1] = past end
  local counts = redis.pcall('HMGET', q.kept, unpack(over))
  for i = 1, #counts do sum = sum - (tonumber(counts[i] or 0) or 0) end
  redis.pcall('HDEL', q.kept, unpack(over))
  if sum <= 0 or redis.call('EXISTS', q.kept) == 0 then return recount_kept_bytes(q, minute) end
  redis.call('SET', q.keptbytes, sum)
end

-- Returns the claims whose lease has ended as a list of {token, ids}, with about 1,000 ids in all,
-- and whether more are left. The newest claim comes first, so that the oldest, put back last, ends
-- at the serving end. A claim whose ids are missing or corrupt has none.
local function read_expired_claims(q)
  local claims, count = {}, 0
  local tokens = redis.call('ZREVRANGEBYSCORE', q.leases, now, '-inf', 'LIMIT', 0, MAX_JOBS)
  for _, token in ipairs(tokens) do
    if count >= MAX_JOBS then return claims, true end
    local ids = decode_table(value_at(q['claim:' .. token])) or {}
    -- No claim has as many; Lua could not pass them to a command.
    if #ids > MAX_JOBS then ids = {} end
    count = count + 1 + #ids
    claims[#claims + 1] = { token = token, ids = ids }
  end
  return claims, false
end

-- Notes in the facts of a job that the worker of `token` was lost with it. Keeps the newest
-- `args.max_deliveries` notes, each of 100 bytes at most.
local function note_lost_delivery(facts, token)
  local lost, max_worker_bytes = facts[LOST_DELIVERIES] or {}, 80
  if #lost >= args.max_deliveries then table.remove(lost, 1) end
  lost[#lost + 1] = now .. ' ' .. (token:match('^(.*):') or token):sub(-max_worker_bytes)
  facts[LOST_DELIVERIES] = lost
end

-- Counts one more delivery of a job whose claim, `token`, expired, and puts the job back; adds it
-- to `ends` instead if its cancel was requested or no delivery is left (a dead letter then).
-- `facts` are unpacked or nil. Adds to back, dead and bytes of `counts`.
local function put_back_or_end(q, id, token, facts, ends, counts)
  facts = facts or {}
  facts[DELIVERIES] = (facts[DELIVERIES] or 0) + 1
  note_lost_delivery(facts, token)
  if facts[CANCEL_REQUESTED] then
    ends[#ends + 1] = cancelled_job(id, facts, now)
  elseif facts[DELIVERIES] >= args.max_deliveries then
    local dead = failed_job(id, 'worker_lost',
      'The worker died or froze each of ' .. facts[DELIVERIES] .. ' times it ran this job.', facts, now)
    dead.token = token
    ends[#ends + 1] = dead
    add_dead_letter(q, id, now, args)
    counts.dead = counts.dead + 1
  else
    redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
    put_back(q, id, facts)
    counts.bytes = counts.bytes + counted_bytes(id)
    table.insert(counts.back, id)
  end
end

-- Removes expired claims with their leases, and puts back or ends those of their jobs that they
-- still own. Adds to `counts`, and to `ends` the jobs it ended; returns true if more are left than
-- one call takes, else false.
local function reap_claims(q, counts, ends)
  local claims, has_more = read_expired_claims(q)
  for _, claim in ipairs(claims) do
    if #claim.ids > 0 then
      local tokens = redis.call('HMGET', q.running, unpack(claim.ids))
      local facts = redis.call('HMGET', q.facts, unpack(claim.ids))
      for i = #claim.ids, 1, -1 do
        if tokens[i] == claim.token then
          put_back_or_end(q, claim.ids[i], claim.token, decode_table(facts[i]), ends, counts)
        end
      end
    end
    redis.call('ZREM', q.leases, claim.token)
    redis.call('DEL', q['claim:' .. claim.token])
  end
  end_jobs(q, ends, args)
  counts.ended = counts.ended + #ends
  return has_more
end

-- Moves up to 1,000 delayed jobs that are due to their lists; drops ids that are no longer pending.
-- Adds to `counts`; returns true if more may be left, else false.
local function promote(q, counts)
  local due = redis.call('ZRANGEBYSCORE', q.delayed, '-inf', now, 'LIMIT', 0, MAX_JOBS)
  for _, id in ipairs(due) do
    redis.call('ZREM', q.delayed, id)
    if value_at(job_key(id, 'status')) == 'pending' then
      redis.call('LPUSH', priority_list(q, decode_table(redis.call('HGET', q.facts, id))), id)
      counts.promoted = counts.promoted + 1
    end
  end
  return #due == MAX_JOBS
end

-- A job past its deadline: one that waits is added to `ends`. One that runs is stopped first: its
-- worker is notified, and if it has not ended the job within a lease, a later call adds it to
-- `ends`. The deadline of a job in any other state is removed.
local function expire_job(q, id, ends, counts)
  local status = value_at(job_key(id, 'status'))
  local facts = decode_table(redis.call('HGET', q.facts, id)) or {}
  local expired = failed_job(id, 'expired', 'The deadline passed before the job was done.', facts, now)
  if status == 'pending' then
    counts.bytes = counts.bytes - counted_bytes(id)
    if not redis.call('ZSCORE', q.delayed, id) then table.insert(counts.stale, id) end
    ends[#ends + 1] = expired
  elseif status == 'processing' and facts[EXPIRED] then
    ends[#ends + 1] = expired
  elseif status == 'processing' then
    facts[EXPIRED] = 1
    redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
    redis.call('ZADD', q.deadlines, now + args.lease_ms, id)
    notify_workers(q, 'expire', id)
  else
    redis.call('ZREM', q.deadlines, id)
  end
end

-- Looks at up to 1,000 jobs whose deadline has passed: ends those that wait, stops those that run
-- (ends them if they were stopped before), and removes the deadline of others. Adds the ended ones
-- to `ends`, which is empty; of `counts`, adds their number to expired, takes the waiting ones' input
-- off bytes, and adds their stale ids to stale; the caller writes bytes and stale to Redis. Returns
-- true if more may be left, else false.
local function expire(q, counts, ends)
  local due = redis.call('ZRANGEBYSCORE', q.deadlines, '-inf', now, 'LIMIT', 0, MAX_JOBS)
  for _, id in ipairs(due) do expire_job(q, id, ends, counts) end
  end_jobs(q, ends, args)
  counts.expired = counts.expired + #ends
  return #due == MAX_JOBS
end

-- Removes dead letters older than `args.dead_letter_ms`, and now and then the log's oldest entries.
-- The log is bounded in jobs, not in entries. A mark, at most every tenth of the bound, holds an
-- entry and the number of jobs there had been; the newest mark that is the bound ago is where to
-- cut.
local function trim_log_and_dead_letters(q)
  redis.call('ZREMRANGEBYSCORE', q.dead, '-inf', now - args.dead_letter_ms)
  local seq = tonumber(value_at(q.seq) or 0) or 0
  local newest = redis.call('LINDEX', q.logmarks, -1)
  local marked = newest and tonumber(newest:match('^(%d+) ')) or 0
  if marked > seq then
    -- The sequence has started again, which would not reach the old marks for a long time.
    redis.call('DEL', q.logmarks)
    marked = 0
  end
  if seq - marked < args.log_jobs / LOG_MARKS then return end
  local last = redis.call('XREVRANGE', q.log, '+', '-', 'COUNT', 1)
  if #last == 0 then return end
  local cut
  for _, mark in ipairs(redis.call('LRANGE', q.logmarks, 0, -1)) do
    local jobs, entry = mark:match('^(%d+) (%d+-%d+)$')
    if jobs and tonumber(jobs) > seq - args.log_jobs then break end
    cut = entry
    redis.call('LPOP', q.logmarks)
  end
  if cut then redis.call('XTRIM', q.log, 'MINID', cut) end
  redis.call('RPUSH', q.logmarks, seq .. ' ' .. last[1][1])
end

-- Sweeps one queue: reaps expired claims, promotes due jobs, expires jobs; and, unless this
-- continues the last call, checks for an outage, drops old counts and trims first. Returns false if
-- it was swept less than half a tick ago (a continued call is not refused); else what the
-- header lists. Raises if a key has another type.
local function sweep(q)
  if not args.is_continued then
    local gate_ms = math.ceil(args.tick_ms / 2)
    if not redis.call('SET', q.reapgate, '1', 'NX', 'PX', gate_ms) then return false end
    drop_expired_kept_bytes(q, check_for_outage(q))
    trim_log_and_dead_letters(q)
  end
  local counts = { back = {}, dead = 0, promoted = 0, expired = 0, ended = 0, bytes = 0, stale = {} }
  local lost, expired = {}, {}
  local has_more = redis.call('EXISTS', q.hold) == 0 and reap_claims(q, counts, lost)
  has_more = promote(q, counts) or has_more
  has_more = expire(q, counts, expired) or has_more
  if #counts.back > 0 or counts.promoted > 0 then
    log_transitions(q, { pending = counts.back })
    ring_doorbell(q)
  end
  update_stale_entries(q, 'SADD', counts.stale)
  adjust_waiting_bytes(q, counts.bytes)
  return {
    #counts.back, counts.dead, counts.promoted, counts.expired, counts.ended, has_more and 1 or 0,
    failures_of(q, { lost, expired }),
  }
end

-- The message of an error that pcall caught, as a string: Redis raises a table, Lua a string.
local function error_text(reason)
  return tostring(type(reason) == 'table' and reason.err or reason)
end

local replies = {}
for i, list in ipairs(KEYS) do
  -- A queue with a damaged key is skipped, so that it does not keep the others from being swept.
  local ok, reply = pcall(sweep, queue(list))
  replies[i] = ok and reply or not ok and error_text(reply)
end
return replies
