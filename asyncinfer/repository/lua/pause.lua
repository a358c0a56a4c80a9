#!lua flags=allow-oom
-- pause: a queue takes jobs in but gives none out, or does again.
-- KEYS    1 the queue
-- ARGV    1 {paused: true | false}
-- Returns 1 when that changed something, else 0

local q, a = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
if a.paused then
  if not redis.call('SET', q.paused, '1', 'NX') then return 0 end
  tell_workers(q, 'pause', '')
  return 1
end
local changed = redis.call('DEL', q.paused)
if changed == 1 then
  tell_workers(q, 'resume', '')
  ring(q)
end
return changed
