#!lua flags=allow-oom
-- keep: keeps the body of a delivery, which each of its tries sends.
-- KEYS    1 the queue
-- ARGV    1 {max_webhook_bytes}; 2 the member of the outbox, 3 the body, 4 a shorter body, which is
--         kept if there is no room for the first ("" for none)
-- Returns the body that is kept: an earlier one if there is one; nil: there is no such delivery
-- Retry   a second call finds the body of the first
-- include: keys webhook_parse webhook_bytes webhook_reserve

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local member, body, shorter = ARGV[2], ARGV[3], ARGV[4]
local id, field, round = parse_delivery(member)
if not id or not redis.call('ZSCORE', q.outbox, member) then return false end

local key = q['webhook:' .. id]
local target, earlier = unpack(redis.call('HMGET', key, 'target', 'body:' .. field))
if not target then return false end
if earlier then return earlier end

local reserved = whole_number(redis.call('HGET', q.webhooks, round))
local sum = tonumber(redis.call('MGET', q.webhookbytes)[1] or 0) or 0
local needed = #target + #body
if shorter ~= '' and needed > reserved and sum + needed - reserved > args.max_webhook_bytes then
  body, needed = shorter, #target + #shorter
end
redis.call('HSET', key, 'body:' .. field, body)
if needed > reserved then reserve_webhook(q, round, needed) end
return body
