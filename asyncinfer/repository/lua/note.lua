#!lua flags=allow-oom
-- note: stores what became of tries of deliveries, and when the next ones are due.
-- KEYS    1 the queue
-- ARGV    1 {failed_ttl_seconds, max_undelivered, max_body_bytes}: max_body_bytes is the largest body
--         that is kept once its delivery is done; then per delivery: member of the outbox, the end of
--         the lease under which it was tried, the state that the caller has read, the new state, when
--         it is due ("" once it is done), outcome ("" for open, delivered, gone or given_up)
-- Returns per delivery "ok" | "absent" | {"changed", the state that Redis has}
-- Order   a try that outlasts its lease is stored, and does not move the due time of a later lease
-- Retry   a second call finds the new state and does the same
-- include: keys time webhook_parse webhook_change webhook_release webhook_settle

local MAX_SURPLUS = 100

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()

-- Whether a delivery is of a job: what is no job has its body as long as it is kept.
local function is_of_job(key) return redis.pcall('HEXISTS', key, 'ttl_seconds') == 0 end

-- Lists a delivery as given up. One that the list has no more room for is not kept any more to be
-- sent again: it loses its body, and is forgotten with its job.
local function list_as_given_up(member)
  redis.pcall('ZADD', q.undelivered, 'NX', now, member)
  redis.pcall('ZREMRANGEBYSCORE', q.undelivered, '-inf', now - args.failed_ttl_seconds * 1000)
  local surplus = redis.pcall('ZRANGE', q.undelivered, 0, -args.max_undelivered - 1)
  for i = 1, math.min(#surplus, MAX_SURPLUS) do
    redis.call('ZREM', q.undelivered, surplus[i])
    local id, field = parse_delivery(surplus[i])
    if id then
      local key = q['webhook:' .. id]
      if is_of_job(key) then redis.pcall('HDEL', key, 'body:' .. field) end
      settle_webhook(q, id, args.failed_ttl_seconds)
    end
  end
end

-- Whether the body of a job's delivery is deleted once that is done: a large one, and one that can
-- be made again, since a completed job is kept as it is and its delivery not for longer.
local function is_body_dropped(delivery, outcome)
  if outcome ~= 'given_up' and delivery.field:match('_completed$') then return true end
  local body = redis.call('HGET', delivery.key, 'body:' .. delivery.field)
  return body and #body > args.max_body_bytes
end

-- Takes a delivery that is done out of the outbox; one that was given up is listed.
local function close_delivery(member, delivery, outcome)
  redis.call('ZREM', q.outbox, member)
  if is_of_job(delivery.key) and is_body_dropped(delivery, outcome) then
    redis.call('HDEL', delivery.key, 'body:' .. delivery.field)
  end
  release_webhook(q, delivery.round)
  if outcome == 'given_up' then
    list_as_given_up(member)
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
