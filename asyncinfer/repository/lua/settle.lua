#!lua flags=allow-oom
-- settle: gives back what is reserved for webhooks that nothing will end, and bounds those given up.
-- KEYS    1 the queue
-- ARGV    1 {cursor, failed_ttl_seconds} cursor: "0", then that of the last reply
-- Returns {cursor, released}: "0" at the end; how many were given back
-- Order   a reservation stays while its job is unfinished in that round, its group is followed, or
--         its delivery is to come
-- Retry   a second call finds nothing left to give back
-- include: keys time job_keys fact_names facts
-- include: webhook_bytes webhook_deliveries webhook_release webhook_settle

local MAX_LOOKS = 200

local q, args, released = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), 0

-- Whether a job is unfinished in this round, and its end will be delivered.
local function is_expected(id, round)
  local status = redis.call('MGET', job_key(id, 'status'))[1]
  if status ~= 'pending' and status ~= 'processing' then return false end
  local facts = decode_table(redis.call('HGET', q.facts, id))
  return facts and facts[WEBHOOK_EVENTS] and (facts[WEBHOOK_ROUND] or 1) == round
end

-- Whether `id` is that of a closed group whose end will be delivered.
local function is_followed(id)
  local digest = id:match('^group(%x+)$')
  return digest and redis.call('ZSCORE', q.closing, digest)
end

-- Whether the outbox has a delivery of this round.
local function is_open(id, round)
  for _, field in ipairs((deliveries_of(q, id))) do
    if tonumber(field:match('^%d+')) == round then return true end
  end
  return false
end

redis.pcall('ZREMRANGEBYSCORE', q.undelivered, '-inf', now_ms() - args.failed_ttl_seconds * 1000)
add_webhook_bytes(q, 0)
local page = redis.call('HSCAN', q.webhooks, args.cursor, 'COUNT', MAX_LOOKS)
for i = 1, #page[2], 2 do
  local name = page[2][i]
  local id, round = name:match('^(.+)_(%d+)$')
  local number = tonumber(round)
  if not id or not (is_expected(id, number) or is_followed(id) or is_open(id, number)) then
    release_webhook(q, name)
    if id then settle_webhook(q, id, args.failed_ttl_seconds) end
    released = released + 1
  end
end
return { page[1], released }
