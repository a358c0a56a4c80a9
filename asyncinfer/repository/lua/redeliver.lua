#!lua flags=allow-oom
-- redeliver: starts the tries of deliveries anew.
-- KEYS    1 the queue
-- ARGV    1 {max_webhooks, max_webhook_bytes}; then per delivery: member of the outbox, the bytes to
--         reserve at least, the state that the caller has read, the new state
-- Returns per delivery "ok" | "absent" | "webhooks_full" | {"changed", the state that Redis has}
-- Order   the room before the writes; a delivery that is open has its room, and is due at once
-- Retry   a second call finds the new state and does the same
-- include: keys time webhook_change webhook_room webhook_reserve

local q, args, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()

-- Makes one delivery due now; returns its verdict.
local function redeliver(member, bytes, expected, state)
  local delivery, verdict = delivery_to_change(q, member, expected, state)
  if not delivery then return verdict end
  if not redis.call('ZSCORE', q.outbox, member) then
    local kept = redis.call('HMGET', delivery.key, 'target', 'body:' .. delivery.field)
    bytes = math.max(bytes, #kept[1] + #(kept[2] or ''))
    if not take_webhook_room(webhook_room(q, args), bytes) then return 'webhooks_full' end
    reserve_webhook(q, delivery.round, bytes)
  end
  redis.call('HSET', delivery.key, delivery.field, state)
  redis.call('PERSIST', delivery.key)
  redis.call('ZADD', q.outbox, now, member)
  redis.pcall('ZREM', q.undelivered, member)
  return 'ok'
end

local verdicts = {}
for i = 2, #ARGV, 4 do
  verdicts[#verdicts + 1] = redeliver(ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3])
end
return verdicts
