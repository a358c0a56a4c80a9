-- Whether a queue can take more webhooks.

-- Returns how many more webhooks a queue takes, and how many more bytes of them, as {count, bytes};
-- each may be negative. `args` holds max_webhooks and max_webhook_bytes; nil if max_webhooks is.
local function webhook_room(q, args)
  if not args.max_webhooks then return nil end
  local count = redis.call('HLEN', q.webhooks)
  -- Another program may have deleted one of the two.
  local sum = count > 0 and tonumber(redis.call('MGET', q.webhookbytes)[1] or 0) or 0
  return { count = args.max_webhooks - count, bytes = args.max_webhook_bytes - sum }
end

-- Takes room for one more webhook of `bytes` from `room`; returns false, and takes none, if there is
-- not enough.
local function take_webhook_room(room, bytes)
  if room.count < 1 or room.bytes < bytes then return false end
  room.count, room.bytes = room.count - 1, room.bytes - bytes
  return true
end
