#!lua flags=allow-oom
-- watch: reads jobs that have ended, and signs an inbox up for those that have not.
-- KEYS    1 the queue, 2 the inbox
-- ARGV    1 {}; then ids
-- Returns per job {status, result, error, meta}, nil when absent, or "registered"
-- Order   one step, so that no end falls between the look and the sign-up

local q, inbox = queue(KEYS[1]), KEYS[2]

local function sign_up(id)
  local facts = unpacked(redis.call('HGET', q.facts, id)) or {}
  local inboxes = facts.w or {}
  for _, known in ipairs(inboxes) do
    if known == inbox then return end
  end
  -- The oldest leaves: its API asks again by itself every few seconds.
  if #inboxes >= WATCHERS then table.remove(inboxes, 1) end
  table.insert(inboxes, inbox)
  facts.w = inboxes
  redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
end

local replies = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local status = value_at(job(id, 'status'))
  if not status then
    replies[i - 1] = false
  elseif status == 'pending' or status == 'processing' then
    sign_up(id)
    replies[i - 1] = 'registered'
  else
    local rest = redis.call('MGET', job(id, 'result'), job(id, 'error'), job(id, 'meta'))
    replies[i - 1] = { status, rest[1], rest[2], rest[3] }
  end
end
return replies
