#!lua flags=allow-oom
-- probe: reads and writes no key, to show whether scripts run and may use the keys of queues and
-- jobs.
-- KEYS    1 a key that never exists, 2 a queue, 3 the status of no job
-- ARGV    1 {}
-- Returns 1
-- Retry   a second call does the same

redis.call('SET', KEYS[1], '', 'XX')
redis.call('EXISTS', KEYS[2], KEYS[3])
return 1
