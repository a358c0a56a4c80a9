#!lua flags=allow-oom
-- gauge: how much waits and runs in a queue, and who might run it; changes nothing.
-- KEYS    1 the queue, 2 the workers
-- ARGV    1 {}
-- Returns {now in ms, waiting, running, paused, {record of a waiting job, ...}, {worker, ...}}:
--         of each priority the record of the job that is served next, ended ones left out
-- Bound   the same whatever waits: lengths, and so many ids at the end of each list

local MOST_PASSED = 100

local q = queue(KEYS[1])

-- The record of the first job from the serving end that waits and has one; a stranger's has none.
local function next_in(list)
  local ids = redis.call('LRANGE', list, -MOST_PASSED, -1)
  if #ids == 0 then return nil end
  local statuses = redis.call('MGET', unpack(each(ids, ':status')))
  for i = #ids, 1, -1 do
    local meta = statuses[i] == 'pending' and redis.call('MGET', job(ids[i], 'meta'))[1]
    if meta then return meta end
  end
end

local records = {}
for _, list in ipairs({ q.high, q.list, q.low }) do
  records[#records + 1] = next_in(list)
end
return {
  now_ms(),
  math.max(0, waiting(q) - redis.call('SCARD', q.ghosts)),
  redis.call('HLEN', q.running),
  redis.call('EXISTS', q.paused),
  records,
  redis.call('ZRANGE', KEYS[2], 0, -1),
}
