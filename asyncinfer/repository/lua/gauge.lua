#!lua flags=no-writes
-- gauge: how many jobs wait and run in queues, and which workers there are; changes nothing.
-- KEYS    1 the workers, 2.. queues
-- ARGV    1 {}
-- Returns {now in ms, {worker, ...}, {per queue: {{high, normal, low}, delayed, running, dead,
--         paused, {record of a waiting job, ...}, webhooks}}}: how many wait in each list, without
--         stale entries, and of each list the record of the job that is served next; webhooks: nil
--         without any, or {reserved, bytes, open, due, when the first is due in ms or nil, given
--         up}; nil in place of a queue or set of workers that has a key of another type
-- Bound   independent of how many jobs wait: lengths, and a fixed number of ids of each list
-- include: keys time depth

-- Returns {reserved, bytes, open, due, when the first is due, given up} of a queue's webhooks; false
-- if it has none.
local function webhooks_of(q)
  if redis.call('EXISTS', q.webhooks, q.undelivered) == 0 then return false end
  return {
    redis.call('HLEN', q.webhooks),
    redis.call('MGET', q.webhookbytes)[1],
    redis.call('ZCARD', q.outbox),
    redis.call('ZCOUNT', q.outbox, '-inf', (now_ms())),
    redis.call('ZRANGE', q.outbox, 0, 0, 'WITHSCORES')[2] or false,
    redis.call('ZCARD', q.undelivered),
  }
end

-- The depth of a queue with its webhooks. Raises if a key has another type.
local function gauge(q)
  local depth = depth_of(q)
  depth[#depth + 1] = webhooks_of(q)
  return depth
end

local gauges = {}
for i = 2, #KEYS do
  local ok, found = pcall(gauge, queue(KEYS[i]))
  gauges[i - 1] = ok and found
end
local ok, workers = pcall(redis.call, 'ZRANGE', KEYS[1], 0, -1)
return { now_ms(), ok and workers, gauges }
