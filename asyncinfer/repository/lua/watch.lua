#!lua flags=allow-oom
-- watch: reads jobs that have ended, and registers an inbox for those that have not.
-- KEYS    1 the queue, 2 the inbox
-- ARGV    1 {}; then ids
-- Returns per job {status, result, error, meta}, nil if absent, or "registered"
-- Order   one step, so that no job ends between the look and the registration
-- include: keys job_keys value fact_names facts

local MAX_INBOXES = 32

local q, inbox = queue(KEYS[1]), KEYS[2]

-- Adds this call's inbox to those that are notified when the job ends, unless it is among them.
local function register(id)
  local facts = decode_table(redis.call('HGET', q.facts, id)) or {}
  local inboxes = facts[INBOXES] or {}
  for _, registered in ipairs(inboxes) do
    if registered == inbox then return end
  end
  -- The oldest one goes: its API also reads the job by itself every few seconds.
  if #inboxes >= MAX_INBOXES then table.remove(inboxes, 1) end
  table.insert(inboxes, inbox)
  facts[INBOXES] = inboxes
  redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
end

local replies = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local status = value_at(job_key(id, 'status'))
  if not status then
    replies[i - 1] = false
  elseif status == 'pending' or status == 'processing' then
    register(id)
    replies[i - 1] = 'registered'
  else
    local values = redis.call('MGET', job_key(id, 'result'), job_key(id, 'error'), job_key(id, 'meta'))
    replies[i - 1] = { status, values[1], values[2], values[3] }
  end
end
return replies
