#!lua flags=allow-oom
-- retract: removes announced versions that no worker has, unless jobs wait for them.
-- KEYS    1 the names of all models, 2 the versions of the model, 3 the default versions,
--         4.. the queues in which jobs of the model may be
-- ARGV    1 {model, versions}
-- Returns how many jobs wait, are delayed or run in the queues; 0: the versions are removed
-- Order   jobs and versions in one step. A submit of an API that still has the model in its cache
--         may come after that: its job waits in a queue that is listed, and a worker that comes
--         with the model runs it
-- Retry   a second call finds nothing left to remove
-- include: keys unfinished

local args, jobs = cmsgpack.unpack(ARGV[1]), 0
for i = 4, #KEYS do jobs = jobs + count_unfinished(queue(KEYS[i])) end
if jobs > 0 then return jobs end
if #args.versions > 0 then redis.call('HDEL', KEYS[2], unpack(args.versions)) end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('SREM', KEYS[1], args.model)
  redis.call('HDEL', KEYS[3], args.model)
end
return 0
