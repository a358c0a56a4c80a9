#!lua flags=allow-oom
-- claim: takes waiting jobs of the first queue that has any, under one lease.
-- KEYS    the queues to look at, in turn (at most 8)
-- ARGV    1 {token, lease_ms, not_after_ms, is_holding, max_jobs, max_bytes, max_jobs_of,
--         low_first, ttl_seconds, failed_ttl_seconds, keep_input, max_kept_bytes}
--         is_holding: this process holds another claim; max_jobs_of: {queue: jobs} of the queues
--         of which fewer than max_jobs are claimed; low_first: low priority before the others
-- Returns {now in ms, queue, blocked, failures, id, data, meta, facts, ...}; no ids: nothing to do;
--         blocked: 1 if the next job must run alone, and this process may not have it yet, else 0;
--         failures: by queue the jobs that could not be claimed and so failed, or nil
-- Retry   a token that holds a claim gets that claim back; after not_after_ms nothing is taken
-- include: time claim

return claim_from_any(KEYS, cmsgpack.unpack(ARGV[1]), now_ms())
