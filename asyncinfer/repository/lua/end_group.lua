#!lua flags=allow-oom
-- end_group: notes that all jobs of a closed group have ended, once.
-- KEYS    1 the queue of the default model
-- ARGV    1 {digest, closed_ms, ended_ms}: of the group, as count_ended returned them
-- Returns 1 if this call noted it, else 0
-- Order   the group leaves those that are followed in the same step, so that it ends once
-- Retry   the second call finds that the group has ended
-- include: keys groups followed

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local closed = q['closed:' .. args.digest]
local is_followed = redis.call('ZSCORE', q.closing, args.digest)
if not is_followed or redis.call('HGET', closed, 'closed_ms') ~= args.closed_ms then return 0 end
unfollow_group(q, args.digest)
redis.call('HSET', closed, 'ended_ms', args.ended_ms)
keep_group(q['group:' .. args.digest], closed)
return 1
