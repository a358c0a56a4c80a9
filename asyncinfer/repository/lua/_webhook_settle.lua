-- include: job_keys webhook_bytes webhook_deliveries
-- How long a webhook is remembered.

-- The most rounds of a job whose deliveries are remembered once they are done.
local MAX_DONE_DELIVERIES = 16
-- Of these, how many, the newest, keep their body, if they have one.
local MAX_DONE_BODIES = 4

-- Lets what is kept of a job's webhook expire with the job if it has no delivery to come, and
-- deletes it if there is nothing to show. What was given up is kept for `failed_ttl_seconds` at
-- least, so that it can be sent again. An unfinished job keeps it.
local function settle_webhook(q, id, failed_ttl_seconds)
  local key = q['webhook:' .. id]
  local open, done, is_given_up = deliveries_of(q, id)
  for i = 1, #done - MAX_DONE_BODIES do redis.call('HDEL', key, 'body:' .. done[i]) end
  for i = 1, #done - MAX_DONE_DELIVERIES do redis.call('HDEL', key, done[i]) end
  local status = redis.call('MGET', job_key(id, 'status'))[1]
  if #open > 0 or status == 'pending' or status == 'processing' then return end
  local ttl_ms = math.max(
    redis.call('PTTL', job_key(id, 'status')),
    is_given_up and failed_ttl_seconds * 1000 or 0,
    1000 * whole_number(redis.pcall('HGET', key, 'ttl_seconds')))
  if #done == 0 or ttl_ms <= 0 then redis.call('DEL', key) else redis.call('PEXPIRE', key, ttl_ms) end
end
