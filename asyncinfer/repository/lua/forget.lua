#!lua flags=allow-oom
-- forget: deletes ended jobs, with all that is kept of them.
-- KEYS    1 the queue
-- ARGV    1 {}; then ids
-- Returns per job "forgotten" | "absent" | the status of one that has not ended, which is left
-- Order   one step, so that a job which a person retries meanwhile keeps its input
-- Retry   a second call finds it absent

local TERMINAL = { completed = true, failed = true, cancelled = true }
local WORDS = { 'data', 'status', 'result', 'error', 'meta' }

local q, names, ids, verdicts, seen = queue(KEYS[1]), {}, {}, {}, {}

local function judge(id)
  local status = redis.call('MGET', job(id, 'status'))[1]
  if not status or seen[id] then return 'absent' end
  return TERMINAL[status] and 'forgotten' or status
end

for i = 2, #ARGV do
  local id = ARGV[i]
  local verdict = judge(id)
  if verdict == 'forgotten' then
    ids[#ids + 1], seen[id] = id, true
    for _, word in ipairs(WORDS) do names[#names + 1] = job(id, word) end
  end
  verdicts[i - 1] = verdict
end
if #ids > 0 then
  -- A ghost of it stays counted until a claim drops its id.
  redis.call('UNLINK', unpack(names))
  redis.call('ZREM', q.dead, unpack(ids))
end
return verdicts
