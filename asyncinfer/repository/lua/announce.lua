#!lua flags=allow-oom
-- announce: says that a worker is alive, and what it says of itself.
-- KEYS    1 the worker's announcement, 2 the workers
-- ARGV    1 {worker, ttl_ms}; 2 what it says, as JSON
-- Returns how many workers were removed, of which nothing was heard for two TTLs
-- Order   with full memory too: a worker that runs jobs must not count as dead
-- Retry   a second call does the same
-- include: time

local args = cmsgpack.unpack(ARGV[1])
local now = now_ms()
redis.call('SET', KEYS[1], ARGV[2], 'PX', args.ttl_ms)
redis.call('ZADD', KEYS[2], math.floor(now / 1000), args.worker)
return redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf',
  math.floor((now - 2 * args.ttl_ms) / 1000) - 1)
