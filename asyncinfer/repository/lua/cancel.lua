#!lua flags=allow-oom
-- cancel: ends jobs that wait, and asks for the end of those that run.
-- KEYS    1 the queue
-- ARGV    1 {ttl, failed_ttl}; then per job: id, meta with seq ("": leave it)
-- Returns per job "cancelled" | "asked" | "absent" | the terminal status it already has
-- Retry   a second call finds the job cancelled and says so

local MOST_REMOVALS = 10
local FAR = 10000

local q, a = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local verdicts, ghosts, freed, removals = {}, {}, 0, 0

-- LREM walks the list, so only a few per call and in no long list (a million cost it 22 ms); the
-- other ids stay as ghosts that claim drops.
local function leave(id, facts)
  freed = freed + counted_bytes(id)
  if redis.call('ZREM', q.delayed, id) == 1 then return end
  local list = list_of(q, facts)
  if removals >= MOST_REMOVALS or redis.call('LLEN', list) > FAR then
    ghosts[#ghosts + 1] = id
    return
  end
  removals = removals + 1
  redis.call('LREM', list, -1, id)
end

local function cancel(id, meta)
  local status = value_at(job(id, 'status'))
  if not status then return 'absent' end
  if status ~= 'pending' and status ~= 'processing' then return status end
  local facts = unpacked(redis.call('HGET', q.facts, id))
  if status == 'processing' and redis.call('HEXISTS', q.running, id) == 1 then
    facts = facts or {}
    if not facts.c then
      facts.c = 1
      redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
      tell_workers(q, 'cancel', id)
    end
    return 'asked'
  end
  if status == 'pending' then leave(id, facts) end
  terminal(q, { { id = id, status = 'cancelled', meta = meta, facts = facts } }, a)
  return 'cancelled'
end

for i = 2, #ARGV, 2 do
  verdicts[#verdicts + 1] = cancel(ARGV[i], ARGV[i + 1] ~= '' and ARGV[i + 1] or nil)
end
haunt(q, ghosts, true)
settle(q, -freed)
return verdicts
