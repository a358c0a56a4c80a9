#!lua flags=allow-oom
-- take: leases deliveries of webhooks that are due.
-- KEYS    the queues to look at, in turn
-- ARGV    1 {lease_ms, max_deliveries, failed_ttl_seconds}
-- Returns {until, ...}: when the lease ends, in ms; then per delivery: queue, member of the outbox,
--         target, state, body or nil
-- Order   the deliveries that have been due for longest come first; one that has no target or no
--         state is dropped, and what it reserved is given back
-- Retry   a second call takes others; those of the first are due again after their lease
-- include: keys time webhook_parse webhook_release webhook_settle

local args, now = cmsgpack.unpack(ARGV[1]), now_ms()
local until_ms, taken = now + args.lease_ms, 0
local reply = { until_ms }

-- Removes a delivery that cannot be sent or noted: its target or state is gone, or its name damaged.
local function drop(q, member, id, field, round)
  redis.call('ZREM', q.outbox, member)
  if not id then return end
  redis.pcall('HDEL', q['webhook:' .. id], field, 'body:' .. field)
  release_webhook(q, round)
  settle_webhook(q, id, args.failed_ttl_seconds)
end

for _, list in ipairs(KEYS) do
  local q, left = queue(list), args.max_deliveries - taken
  local due = left > 0
    and redis.pcall('ZRANGEBYSCORE', q.outbox, '-inf', now, 'LIMIT', 0, left) or {}
  for i = 1, #due do
    local member = due[i]
    local id, field, round = parse_delivery(member)
    local found = id and redis.pcall('HMGET', q['webhook:' .. id], 'target', field, 'body:' .. field)
    if found and found[1] and found[2] then
      taken = taken + 1
      redis.call('ZADD', q.outbox, until_ms, member)
      local n = #reply
      reply[n + 1], reply[n + 2], reply[n + 3] = list, member, found[1]
      reply[n + 4], reply[n + 5] = found[2], found[3]
    else
      drop(q, member, id, field, round)
    end
  end
end
return reply
