-- include: webhook_bytes
-- What a webhook has reserved is given back.

-- Gives back what a round has reserved, by its name; does nothing if it has nothing.
local function release_webhook(q, name)
  local bytes = whole_number(redis.pcall('HGET', q.webhooks, name))
  if redis.pcall('HDEL', q.webhooks, name) == 1 then add_webhook_bytes(q, -bytes) end
end
