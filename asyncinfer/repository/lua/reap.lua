#!lua flags=allow-oom
-- reap: one sweep of the queues: dead claims, due jobs, passed deadlines, bounds.
-- KEYS    queues
-- ARGV    1 {tick, lease, max_deliveries, max_dead, dead_ms, ttl, failed_ttl, log_jobs, more}
--         times in ms, ttls in s; more: go on past the gate with what the last call left
-- Returns per queue nil (swept lately) or {put back, dead, promoted, expired, ended, more}, or
--         what kept it from being swept
-- Order   the outage guard before the claims: after a gap nobody's jobs are taken for one lease

local MOST = 1000
local LOG_MARKS = 10

local a, now = cmsgpack.unpack(ARGV[1]), now_ms()

-- A gap since the last sweep (an outage, a jump of the clock, nobody alive) says nothing about
-- the workers, who could not renew either: all leases get one more.
local function guard(q)
  local last = tonumber(value_at(q.swept))
  redis.call('SET', q.swept, now, 'PX', 2 * a.lease)
  if not last or last > now or now - last > a.lease / 2 then
    redis.call('SET', q.hold, '1', 'PX', a.lease)
  end
  for _, token in ipairs(redis.call('ZRANGEBYSCORE', q.leases, now + 2 * a.lease, '+inf')) do
    redis.call('ZADD', q.leases, now + a.lease, token)
  end
end

-- Newest claim first and its ids from the last, so that the oldest ends at the serving end.
local function expired_claims(q)
  local lost, handled = {}, 0
  for _, token in ipairs(redis.call('ZREVRANGEBYSCORE', q.leases, now, '-inf', 'LIMIT', 0, MOST)) do
    if handled >= MOST then return lost, true end
    local known = value_at(q['claim:' .. token])
    local ids = unpacked(known) or {}
    -- No claim has as many; Lua could not hand them on.
    if #ids > MOST then ids = {} end
    handled = handled + 1 + #ids
    lost[#lost + 1] = { token = token, ids = ids }
  end
  return lost, false
end

local function deliver_again(q, id, facts, ends, counts)
  facts = facts or {}
  facts.d = (facts.d or 0) + 1
  if facts.c then
    ends[#ends + 1] = { id = id, status = 'cancelled', facts = facts }
  elseif facts.d >= a.max_deliveries then
    ends[#ends + 1] = failed(id, 'worker_lost',
      'The worker died or froze each of ' .. facts.d .. ' times it ran this job.', facts)
    bury(q, id, now, a)
    counts.dead = counts.dead + 1
  else
    redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
    put_back(q, id, facts)
    counts.bytes = counts.bytes + counted_bytes(id)
    table.insert(counts.back, id)
  end
end

local function reap_claims(q, counts)
  local claims, more = expired_claims(q)
  local ends = {}
  for _, claim in ipairs(claims) do
    if #claim.ids > 0 then
      local tokens = redis.call('HMGET', q.running, unpack(claim.ids))
      local facts = redis.call('HMGET', q.facts, unpack(claim.ids))
      for i = #claim.ids, 1, -1 do
        if tokens[i] == claim.token then
          deliver_again(q, claim.ids[i], unpacked(facts[i]), ends, counts)
        end
      end
    end
    redis.call('ZREM', q.leases, claim.token)
    redis.call('DEL', q['claim:' .. claim.token])
  end
  terminal(q, ends, a)
  counts.ended = counts.ended + #ends
  return more
end

local function promote(q, counts)
  local due = redis.call('ZRANGEBYSCORE', q.delayed, '-inf', now, 'LIMIT', 0, MOST)
  for _, id in ipairs(due) do
    redis.call('ZREM', q.delayed, id)
    if value_at(job(id, 'status')) == 'pending' then
      redis.call('LPUSH', list_of(q, unpacked(redis.call('HGET', q.facts, id))), id)
      counts.promoted = counts.promoted + 1
    end
  end
  return #due == MOST
end

local function past_deadline(q, id, ends, counts)
  local status = value_at(job(id, 'status'))
  local facts = unpacked(redis.call('HGET', q.facts, id)) or {}
  local late = failed(id, 'expired', 'The deadline passed before the job was done.', facts)
  if status == 'pending' then
    counts.bytes = counts.bytes - counted_bytes(id)
    if not redis.call('ZSCORE', q.delayed, id) then table.insert(counts.ghosts, id) end
    ends[#ends + 1] = late
  elseif status == 'processing' and facts.e then
    ends[#ends + 1] = late
  elseif status == 'processing' then
    facts.e = 1
    redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
    redis.call('ZADD', q.deadlines, now + a.lease, id)
    tell_workers(q, 'expire', id)
  else
    redis.call('ZREM', q.deadlines, id)
  end
end

local function expire(q, counts)
  local ends = {}
  local due = redis.call('ZRANGEBYSCORE', q.deadlines, '-inf', now, 'LIMIT', 0, MOST)
  for _, id in ipairs(due) do past_deadline(q, id, ends, counts) end
  terminal(q, ends, a)
  counts.expired = counts.expired + #ends
  return #due == MOST
end

-- The log is bounded in jobs, not in entries. A mark, at most every tenth of the bound, says how
-- many jobs there had been at an entry; the newest mark that is the bound ago says where to cut.
local function trim(q)
  redis.call('ZREMRANGEBYSCORE', q.dead, '-inf', now - a.dead_ms)
  local seq = tonumber(value_at(q.seq) or 0) or 0
  local newest = redis.call('LINDEX', q.logmarks, -1)
  local marked = newest and tonumber(newest:match('^(%d+) ')) or 0
  if marked > seq then
    -- The count has begun anew, so the marks of the old one would not be reached for a long time.
    redis.call('DEL', q.logmarks)
    marked = 0
  end
  if seq - marked < a.log_jobs / LOG_MARKS then return end
  local last = redis.call('XREVRANGE', q.log, '+', '-', 'COUNT', 1)
  if #last == 0 then return end
  local cut
  for _, mark in ipairs(redis.call('LRANGE', q.logmarks, 0, -1)) do
    local jobs, entry = mark:match('^(%d+) (%d+-%d+)$')
    if jobs and tonumber(jobs) > seq - a.log_jobs then break end
    cut = entry
    redis.call('LPOP', q.logmarks)
  end
  if cut then redis.call('XTRIM', q.log, 'MINID', cut) end
  redis.call('RPUSH', q.logmarks, seq .. ' ' .. last[1][1])
end

local function sweep(q)
  if not a.more then
    if not redis.call('SET', q.reapgate, '1', 'NX', 'PX', math.ceil(a.tick / 2)) then return false end
    guard(q)
    trim(q)
  end
  local counts = { back = {}, dead = 0, promoted = 0, expired = 0, ended = 0, bytes = 0, ghosts = {} }
  local more = redis.call('EXISTS', q.hold) == 0 and reap_claims(q, counts)
  more = promote(q, counts) or more
  more = expire(q, counts) or more
  if #counts.back > 0 or counts.promoted > 0 then
    record(q, { pending = counts.back })
    ring(q)
  end
  haunt(q, counts.ghosts, true)
  settle(q, counts.bytes)
  return { #counts.back, counts.dead, counts.promoted, counts.expired, counts.ended, more and 1 or 0 }
end

local function failure(reason)
  return tostring(type(reason) == 'table' and reason.err or reason)
end

local replies = {}
for i, list in ipairs(KEYS) do
  -- A queue with a damaged key is left, so that it does not keep the others from being swept.
  local ok, reply = pcall(sweep, queue(list))
  replies[i] = ok and reply or not ok and failure(reply)
end
return replies
