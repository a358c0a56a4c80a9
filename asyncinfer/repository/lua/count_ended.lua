#!lua flags=allow-oom
-- count_ended: counts the ended jobs of closed groups, in each up to the first that has not ended.
-- KEYS    1 the queue of the default model
-- ARGV    1 {max_groups, max_jobs, look_ms}: the bounds of this call, and how long a group is left
--         alone after it was looked at
-- Returns {1 if more can be counted at once, else 0; then of each group whose jobs have all ended
--         {digest, closed_ms, tenant, name, webhook, ended_ms, completed, failed, cancelled,
--         expired}; ended_ms is when that was first found}
-- Order   the list of a closed group does not change, so what is counted is not read again
-- Retry   the second call goes on from what the first one counted
-- include: keys job_keys time groups

local DAMAGED_MS = 60000
local TERMINAL = { completed = true, failed = true, cancelled = true }

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
-- At most 1,000 looks a second, however many groups are followed.
local next_look_ms = now + math.max(args.look_ms, redis.call('ZCARD', q.closing))
local jobs_left, reply = args.max_jobs, { 0 }

-- Reads the jobs of a list from `cursor` on, at most `jobs_left`, up to the first that has not
-- ended. Returns how many have ended, in all and by status (expired: no longer kept), and whether
-- the next one may have. Most looks find that the first has not, so that is read alone.
local function count_from(list, cursor)
  local counts, count = { completed = 0, failed = 0, cancelled = 0, expired = 0 }, 0
  local first = redis.call('LINDEX', list, cursor)
  local status = first and redis.call('MGET', job_key(first, 'status'))[1]
  if not first or (status and not TERMINAL[status]) then return 0, counts, false end
  local ids = redis.call('LRANGE', list, cursor, cursor + jobs_left - 1)
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
  if not is_whole or length == 0 then return redis.call('ZREM', q.closing, digest) end
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
    reply[#reply + 1] = { digest, fields[1], fields[2], fields[3], fields[4],
      tonumber(fields[10]) or now, completed, failed, cancelled, expired }
  end
end

local due = { 'ZRANGE', q.closing, '-inf', now, 'BYSCORE', 'LIMIT', 0, args.max_groups }
for _, digest in ipairs(redis.call(unpack(due))) do
  if jobs_left <= 0 then
    reply[1] = 1
    break
  end
  if not pcall(count_group, digest) then
    -- A key of another type: the other groups are counted nevertheless.
    redis.call('ZADD', q.closing, now + DAMAGED_MS, digest)
  end
end
return reply
