#!lua flags=allow-oom
-- claim: takes waiting jobs of the first queue that has any, under one lease.
-- KEYS    the queues to look at, in turn (at most 8)
-- ARGV    1 {token, lease, not_after, held, jobs, bytes, low_first, ttl, failed_ttl, ...}
-- Returns {now, queue, blocked, id, data, meta, facts, ...}; no ids: nothing to do
-- Retry   a token that holds a claim gets that claim back; after not_after nothing is taken

return take_first(KEYS, cmsgpack.unpack(ARGV[1]), now_ms())
