#!lua flags=no-writes
-- gauge: how many jobs wait and run in queues, and which workers there are; changes nothing.
-- KEYS    1 the workers, 2.. queues
-- ARGV    1 {}
-- Returns {now in ms, {worker, ...}, {per queue: {{high, normal, low}, delayed, running, dead,
--         paused, {record of a waiting job, ...}}}}: how many wait in each list, without stale
--         entries, and of each list the record of the job that is served next; nil in place of a
--         queue or set of workers that has a key of another type
-- Bound   independent of how many jobs wait: lengths, and a fixed number of ids of each list
-- include: keys time depth

local gauges = {}
for i = 2, #KEYS do
  local ok, found = pcall(depth_of, queue(KEYS[i]))
  gauges[i - 1] = ok and found
end
local ok, workers = pcall(redis.call, 'ZRANGE', KEYS[1], 0, -1)
return { now_ms(), ok and workers, gauges }
