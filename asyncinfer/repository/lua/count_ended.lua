#!lua flags=allow-oom
-- count_ended: counts the ended jobs of closed groups, in each up to the first that has not ended.
-- KEYS    1 the queue of the default model
-- ARGV    1 {max_groups, max_jobs, look_ms}: the bounds of this call, and how long a group is left
--         alone after it was looked at
-- Returns {1 if more can be counted at once, else 0; then of each group whose jobs have all ended
--         {digest, closed_ms, name, webhook, ended_ms, completed, failed, cancelled, expired};
--         ended_ms is when that was first found}
-- Order   the list of a closed group does not change, so what is counted is not read again
-- Retry   the second call goes on from what the first one counted
-- include: keys job_keys time groups followed

local DAMAGED_MS = 60000
local DAY_MS = 24 * 3600 * 1000
local TERMINAL = { completed = true, failed = true, cancelled = true }

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
-- At most 400 looks a second, however many groups are followed.
local next_look_ms = now + math.max(args.look_ms, 2.5 * redis.call('ZCARD', q.closing))
local jobs_left, reply = args.max_jobs, { 0 }

-- Reads the jobs of a list from `cursor` on, at most `jobs_left`, up to the first that has not
-- ended. Returns how many have ended, in all and by status (expired: no longer kept), and whether
-- the next one may have.
local function count_from(list, cursor)
  local counts, count = { completed = 0, failed = 0, cancelled = 0, expired = 0 }, 0
  local ids = redis.call('LRANGE', list, cursor, cursor + jobs_left - 1)
  if #ids == 0 then return 0, counts, false end
  jobs_left = jobs_left - #ids
  for _, found in ipairs(redis.call('MGET', unpack(job_keys(ids, ':status')))) do
    if found and not TERMINAL[found] then return count, counts, false end
    local word = found or 'expired'
    counts[word], count = counts[word] + 1, count + 1
  end
  return count, counts, true
end

-- Counts on in one group and notes when it is looked at next; adds it to the reply if all its jobs
-- have ended.
local function count_group(digest)
  local list, closed = q['group:' .. digest], q['closed:' .. digest]
  local fields = redis.call('HMGET', closed, 'closed_ms', 'tenant', 'name', 'webhook', 'completed',
    'failed', 'cancelled', 'expired', 'cursor', 'counted_ms')
  local cursor, length = tonumber(fields[9]), redis.call('LLEN', list)
  local is_whole = fields[1] and fields[2] and fields[3] and fields[4] and cursor
  -- One that is no longer kept, as after a loss of data, is not followed.
  if not is_whole or length == 0 then return unfollow_group(q, digest) end
  local count, counts, may_go_on = count_from(list, cursor)
  local function sum(place, word) return (tonumber(fields[place]) or 0) + counts[word] end
  local completed, failed = sum(5, 'completed'), sum(6, 'failed')
  local cancelled, expired = sum(7, 'cancelled'), sum(8, 'expired')
  cursor = cursor + count
  may_go_on = may_go_on and cursor < length
  if count > 0 then
    redis.call('HSET', closed, 'cursor', cursor, 'completed', completed, 'failed', failed,
      'cancelled', cancelled, 'expired', expired)
  end
  redis.call('ZADD', q.closing, may_go_on and now or next_look_ms, digest)
  keep_group(list, closed)
  if may_go_on then reply[1] = 1 end
  if cursor >= length then
    redis.call('HSETNX', closed, 'counted_ms', now)
    reply[#reply + 1] = { digest, fields[1], fields[3], fields[4], tonumber(fields[10]) or now,
      completed, failed, cancelled, expired }
  end
end

-- Returns the first job of a group that was not counted; nil if there is none. Keeps the group.
local function next_job(digest)
  local list, closed = q['group:' .. digest], q['closed:' .. digest]
  local cursor = redis.call('HGET', closed, 'cursor')
  local id = cursor and redis.call('LINDEX', list, cursor)
  -- Once a day: a look that changes nothing writes as little as can be.
  if id and redis.call('PTTL', closed) < 1000 * GROUP_SECONDS - DAY_MS then
    keep_group(list, closed)
  end
  return id or nil
end

-- Splits groups into those whose next job has not ended and others, each a list of digests. Nearly
-- all looks end here, so the statuses of all are read with one command. A group with a key of
-- another type is left alone for a while, and holds up no other.
local function split(digests)
  local waiting, others, candidates, names = {}, {}, {}, {}
  for _, digest in ipairs(digests) do
    local is_whole, id = pcall(next_job, digest)
    if not is_whole then
      redis.call('ZADD', q.closing, now + DAMAGED_MS, digest)
    elseif id then
      candidates[#candidates + 1], names[#names + 1] = digest, job_key(id, 'status')
    else
      others[#others + 1] = digest
    end
  end
  for i, status in ipairs(#names > 0 and redis.call('MGET', unpack(names)) or {}) do
    local found = status and not TERMINAL[status] and waiting or others
    found[#found + 1] = candidates[i]
  end
  return waiting, others
end

local due = redis.call('ZRANGE', q.closing, '-inf', now, 'BYSCORE', 'LIMIT', 0, args.max_groups)
if #due == args.max_groups then reply[1] = 1 end
local waiting, others = split(due)
local scores = {}
for i, digest in ipairs(waiting) do scores[2 * i - 1], scores[2 * i] = next_look_ms, digest end
if #scores > 0 then redis.call('ZADD', q.closing, unpack(scores)) end
for _, digest in ipairs(others) do
  if jobs_left <= 0 then
    reply[1] = 1
    break
  end
  if not pcall(count_group, digest) then
    redis.call('ZADD', q.closing, now + DAMAGED_MS, digest)
  end
end
return reply
