#!lua flags=allow-oom
-- note: stores what became of tries of deliveries, and when the next ones are due.
-- KEYS    1 the queue
-- ARGV    1 {failed_ttl_seconds, max_undelivered}; then per delivery: member of the outbox, the end
--         of the lease under which it was tried, the state that the caller has read, the new state,
--         when it is due ("" once it is done), outcome ("" for open, delivered, gone or given_up)
-- Returns per delivery "ok" | "absent" | {"changed", the state that Redis has}
-- Order   a try that outlasts its lease is stored, and does not move the due time of a later lease
-- Retry   a second call finds the new state and does the same
-- include: keys time webhook_change webhook_release webhook_settle

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()

-- Takes a delivery that is done out of the outbox, with the body of a job, which can be made again;
-- one that was given up is listed.
local function close_delivery(member, delivery, outcome)
  redis.call('ZREM', q.outbox, member)
  if redis.call('HEXISTS', delivery.key, 'ttl_seconds') == 0 then
    redis.call('HDEL', delivery.key, 'body:' .. delivery.field)
  end
  release_webhook(q, delivery.round)
  if outcome == 'given_up' then
    redis.pcall('ZADD', q.undelivered, 'NX', now, member)
    redis.pcall('ZREMRANGEBYSCORE', q.undelivered, '-inf', now - args.failed_ttl_seconds * 1000)
    redis.pcall('ZREMRANGEBYRANK', q.undelivered, 0, -args.max_undelivered - 1)
  else
    redis.pcall('ZREM', q.undelivered, member)
  end
  settle_webhook(q, delivery.id, args.failed_ttl_seconds)
end

-- Stores the state of one delivery; returns its verdict.
local function note(member, lease, expected, state, due, outcome)
  local delivery, verdict = delivery_to_change(q, member, expected, state)
  if not delivery then return verdict end
  local score = tonumber(redis.call('ZSCORE', q.outbox, member) or nil)
  redis.call('HSET', delivery.key, delivery.field, state)
  if outcome ~= '' then
    close_delivery(member, delivery, outcome)
  elseif score and score == tonumber(lease) then
    redis.call('ZADD', q.outbox, due, member)
  end
  return 'ok'
end

local verdicts = {}
for i = 2, #ARGV, 6 do verdicts[#verdicts + 1] = note(unpack(ARGV, i, i + 5)) end
return verdicts
