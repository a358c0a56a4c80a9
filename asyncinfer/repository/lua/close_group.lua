#!lua flags=allow-oom
-- close_group: lets no more jobs join a group, and notes where the end of all of them is delivered.
-- KEYS    1 the queue of the default model
-- ARGV    1 {digest, max_closing, tenant, name, webhook, bytes, max_webhooks, max_webhook_bytes}:
--         of the group; webhook is where its delivery goes, "" for none, and bytes what it
--         reserves; tenant and name are kept with it
-- Returns "closed", now or before | "absent": there is no such group | "other": it was closed with
--         another webhook | "full": max_closing groups are followed | "tenant_full": its tenant has as
--         many of them as are left for all | "webhooks_full"
-- Order   a webhook may be added to a group that was closed without one, also when all have ended
-- Retry   the second call finds the same webhook
-- include: keys time groups followed webhook_names webhook_room webhook_reserve

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local list, closed = q['group:' .. args.digest], q['closed:' .. args.digest]

-- Why the webhook of a group that had none is not taken; nil if it is.
local function refusal()
  local free = args.max_closing - redis.call('ZCARD', q.closing)
  if free <= 0 then return 'full' end
  if followed_of(q, args.tenant) >= free then return 'tenant_full' end
  if not take_webhook_room(webhook_room(q, args), args.bytes) then return 'webhooks_full' end
end

local known = redis.call('HMGET', closed, 'closed_ms', 'webhook')
local closed_ms, webhook = known[1], known[2]
if not closed_ms and redis.call('EXISTS', list) == 0 then return 'absent' end
if webhook and args.webhook ~= '' and webhook ~= args.webhook then return 'other' end
local is_new = args.webhook ~= '' and not webhook
if closed_ms and not is_new then return 'closed' end
local refused = is_new and refusal()
if refused then return refused end

local now = now_ms()
closed_ms = closed_ms or now
local round = webhook_round('group' .. args.digest, closed_ms)
redis.call('HSET', closed, 'closed_ms', closed_ms)
if is_new then
  reserve_webhook(q, round, args.bytes)
  redis.call('HSET', closed, 'webhook', args.webhook, 'tenant', args.tenant, 'name', args.name,
    'cursor', 0)
  follow_group(q, args.digest, args.tenant, now)
end
keep_group(list, closed)
return 'closed'
