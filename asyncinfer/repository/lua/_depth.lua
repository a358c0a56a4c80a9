-- include: job_keys
-- How many jobs wait and run in a queue, and which are served next.

local MAX_SKIPPED = 100
local MAX_CHECKED = 1000

-- The record of the first pending job from the serving end of the list at key `list`, as bytes.
-- External jobs have none and are passed over; nil if there is no other among the first 100 ids.
local function next_record(list)
  local ids = redis.call('LRANGE', list, -MAX_SKIPPED, -1)
  if #ids == 0 then return nil end
  local statuses = redis.call('MGET', unpack(job_keys(ids, ':status')))
  for i = #ids, 1, -1 do
    local meta = statuses[i] == 'pending' and redis.call('MGET', job_key(ids[i], 'meta'))[1]
    if meta then return meta end
  end
end

-- Returns how many stale entries a list of `count` ids has, a whole number: counted among the 1,000
-- at its serving end, and for a longer list estimated from those.
local function stale_in(q, list, count)
  local ids = redis.call('LRANGE', list, -MAX_CHECKED, -1)
  if #ids == 0 then return 0 end
  local found = 0
  for _, is_stale in ipairs(redis.call('SMISMEMBER', q.stale, unpack(ids))) do
    found = found + is_stale
  end
  return math.floor(found * count / #ids)
end

-- Returns how many jobs wait in each of `lists` (keys), in that order: lengths less stale entries.
-- Stale entries are counted in all lists but the longest (estimated in one of over 1,000 ids); what
-- is left of the queue's number of stale entries is taken off the longest.
local function waiting_in(q, lists)
  local counts, longest = {}, 1
  for i, list in ipairs(lists) do
    counts[i] = redis.call('LLEN', list)
    if counts[i] > counts[longest] then longest = i end
  end
  local stale = redis.call('SCARD', q.stale)
  if stale == 0 then return counts end
  for i, list in ipairs(lists) do
    if i ~= longest then
      local here = math.min(stale, stale_in(q, list, counts[i]))
      counts[i], stale = counts[i] - here, stale - here
    end
  end
  counts[longest] = math.max(0, counts[longest] - stale)
  return counts
end

-- Returns {{high, normal, low}, delayed, running, dead, paused, {record, ...}} of a queue: numbers
-- of jobs, paused 1 or 0, and the record of the next job of each list, if it has one. Raises if a
-- key has another type.
local function depth_of(q)
  local lists, records = { q.high, q.list, q.low }, {}
  for _, list in ipairs(lists) do records[#records + 1] = next_record(list) end
  return {
    waiting_in(q, lists),
    redis.call('ZCARD', q.delayed),
    redis.call('HLEN', q.running),
    redis.call('ZCARD', q.dead),
    redis.call('EXISTS', q.paused),
    records,
  }
end
