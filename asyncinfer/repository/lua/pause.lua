#!lua flags=allow-oom
-- pause: a queue takes jobs in but gives none out, or gives them out again.
-- KEYS    1 the queue
-- ARGV    1 {is_paused: true | false}
-- Returns 1 if that changed something, else 0
-- include: keys doorbell control

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
if args.is_paused then
  if not redis.call('SET', q.paused, '1', 'NX') then return 0 end
  notify_workers(q, 'pause', '')
  return 1
end
local changed = redis.call('DEL', q.paused)
if changed == 1 then
  notify_workers(q, 'resume', '')
  ring_doorbell(q)
end
return changed
