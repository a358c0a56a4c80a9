-- include: time fact_names webhook_names webhook_release webhook_settle
-- The ends of jobs, as deliveries in the outbox.

local EVENT_BITS = { completed = 1, failed = 2, cancelled = 4 }

-- Puts the ends of jobs with a webhook, at least one, into the outbox, due at once, with the time of
-- the end; gives back what is reserved for an end of which the webhook does not want to hear. `ends`
-- are those of `end_jobs`, whose statuses are stored already.
local function end_webhooks(q, ends, failed_ttl_seconds)
  local now, due = now_ms(), {}
  for _, ended in ipairs(ends) do
    local round = ended.facts[WEBHOOK_ROUND] or 1
    local name = webhook_round(ended.id, round)
    local bit = EVENT_BITS[ended.status]
    if ended.facts[WEBHOOK_EVENTS] % (2 * bit) >= bit then
      due[#due + 1], due[#due + 2] = now, name .. '_' .. ended.status
      local field = ('%d_'):format(round) .. ended.status
      redis.pcall('HSETNX', q['webhook:' .. ended.id], field, ('%d'):format(now))
    else
      release_webhook(q, name)
      settle_webhook(q, ended.id, failed_ttl_seconds)
    end
  end
  if #due > 0 then redis.pcall('ZADD', q.outbox, unpack(due)) end
end
