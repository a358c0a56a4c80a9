-- include: webhook_bytes
-- What a webhook reserves.

-- Reserves `bytes` for a round, by its name, in place of what it has reserved.
local function reserve_webhook(q, name, bytes)
  local before = whole_number(redis.pcall('HGET', q.webhooks, name))
  redis.pcall('HSET', q.webhooks, name, bytes)
  add_webhook_bytes(q, bytes - before)
end
