#!lua flags=allow-oom
-- gauge: how much waits and runs in queues, and who might run it; changes nothing.
-- KEYS    1 the workers, 2.. queues
-- ARGV    1 {}
-- Returns {now in ms, {worker, ...}, {per queue: {{high, normal, low}, delayed, running, dead,
--         paused, {record of a waiting job, ...}}}}: how many wait in each list, ended ones left
--         out, and of each the record of the job that is served next; nil in place of what has
--         a key of another type
-- Bound   the same whatever waits: lengths, and so many ids at the end of each list

local MOST_PASSED = 100
local MOST_TOLD_APART = 1000

-- The record of the first job from the serving end that waits and has one; a stranger's has none.
local function next_in(list)
  local ids = redis.call('LRANGE', list, -MOST_PASSED, -1)
  if #ids == 0 then return nil end
  local statuses = redis.call('MGET', unpack(each(ids, ':status')))
  for i = #ids, 1, -1 do
    local meta = statuses[i] == 'pending' and redis.call('MGET', job(ids[i], 'meta'))[1]
    if meta then return meta end
  end
end

-- How many ghosts are in a list; where it is long, as many of it as of its serving end.
local function ghosts_in(q, list, count)
  local ids = redis.call('LRANGE', list, -MOST_TOLD_APART, -1)
  if #ids == 0 then return 0 end
  local found = 0
  for _, is_one in ipairs(redis.call('SMISMEMBER', q.ghosts, unpack(ids))) do found = found + is_one end
  return math.floor(found * count / #ids)
end

-- What waits in each list. The longest has the ghosts that the others have not.
local function waiting_in(q, lists)
  local counts, longest = {}, 1
  for i, list in ipairs(lists) do
    counts[i] = redis.call('LLEN', list)
    if counts[i] > counts[longest] then longest = i end
  end
  local ghosts = redis.call('SCARD', q.ghosts)
  if ghosts == 0 then return counts end
  for i, list in ipairs(lists) do
    if i ~= longest then
      local here = math.min(ghosts, ghosts_in(q, list, counts[i]))
      counts[i], ghosts = counts[i] - here, ghosts - here
    end
  end
  counts[longest] = math.max(0, counts[longest] - ghosts)
  return counts
end

local function gauge(q)
  local lists, records = { q.high, q.list, q.low }, {}
  for _, list in ipairs(lists) do records[#records + 1] = next_in(list) end
  return {
    waiting_in(q, lists),
    redis.call('ZCARD', q.delayed),
    redis.call('HLEN', q.running),
    redis.call('ZCARD', q.dead),
    redis.call('EXISTS', q.paused),
    records,
  }
end

local gauges = {}
for i = 2, #KEYS do
  local ok, found = pcall(gauge, queue(KEYS[i]))
  gauges[i - 1] = ok and found
end
local ok, workers = pcall(redis.call, 'ZRANGE', KEYS[1], 0, -1)
return { now_ms(), ok and workers, gauges }
