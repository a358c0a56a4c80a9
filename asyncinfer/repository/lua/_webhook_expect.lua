-- include: webhook_bytes webhook_names
-- The webhooks of new rounds, until the rounds end.

-- Reserves what the delivery of the end of each job's new round takes, and keeps where it goes.
-- `jobs`, at least one, is a list of {id, options}; the options are those of `submit`, with a webhook.
-- A key of another type loses the webhook and stops no script half way.
local function expect_webhooks(q, jobs)
  local names, entries, sum = {}, {}, 0
  for i, job in ipairs(jobs) do
    names[i] = webhook_round(job.id, job.options.webhook_round or 1)
    entries[2 * i - 1], entries[2 * i] = names[i], job.options.webhook_bytes
  end
  local before = redis.pcall('HMGET', q.webhooks, unpack(names))
  for i, job in ipairs(jobs) do
    sum = sum + job.options.webhook_bytes - whole_number(before[i])
    local key = q['webhook:' .. job.id]
    redis.pcall('HSET', key, 'target', job.options.webhook_target)
    if job.options.webhook_round then redis.call('PERSIST', key) end
  end
  redis.pcall('HSET', q.webhooks, unpack(entries))
  add_webhook_bytes(q, sum)
end
