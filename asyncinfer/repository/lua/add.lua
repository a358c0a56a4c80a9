#!lua flags=allow-oom
-- add: puts a delivery with its body into the outbox, for what is not a job.
-- KEYS    1 the queue
-- ARGV    1 {name, round, event, bytes, ttl_seconds}: of what it tells, as a job's id, round and
--         event; what it reserves; how long it is kept once it is done; then target, body
-- Returns "ok" | "exists": this round has had its delivery
-- Retry   the second call answers exists
-- include: keys time webhook_names webhook_reserve

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local target, body = ARGV[2], ARGV[3]
local key, name = q['webhook:' .. args.name], webhook_round(args.name, args.round)
local field = ('%d_'):format(args.round) .. args.event
if redis.call('HEXISTS', key, field) == 1 then return 'exists' end

reserve_webhook(q, name, args.bytes)
redis.call('HSET', key, 'target', target, field, '', 'body:' .. field, body,
  'ttl_seconds', args.ttl_seconds)
redis.call('PERSIST', key)
redis.call('ZADD', q.outbox, now_ms(), name .. '_' .. args.event)
return 'ok'
