#!lua flags=allow-oom
-- default: makes another model the default one, unless a job would change its model by that.
-- KEYS    1 the name of the default model, 2 the queue of the default model, 3 the queue that the
--         old one has when it is not the default, 4 the queue that the new one has had so far
-- ARGV    1 {from, to}: names; from "" if it was decided that there is none, to "" to decide it
-- Returns {"taken"} | {"changed"}: the default is not `from` (any more)
--         | {"busy", jobs in 2, jobs in 4}: how many jobs wait, are delayed or run there
-- Order   jobs and name in one step, so that a submit comes before both or after both
-- Retry   a second call returns changed; the caller reads the name again
-- include: keys value unfinished

local args = cmsgpack.unpack(ARGV[1])
local default_q, old_q, new_q = queue(KEYS[2]), queue(KEYS[3]), queue(KEYS[4])

-- Pauses or resumes a queue, without a message to its workers; any value but false and nil pauses
-- it. A model keeps its pause, or stays without one, when its jobs move to another queue.
local function set_paused(q, is_paused)
  if is_paused then redis.call('SET', q.paused, '1') else redis.call('DEL', q.paused) end
end

if value_at(KEYS[1]) ~= args.from then return { 'changed' } end
if args.from ~= '' then
  local old_jobs = count_unfinished(default_q)
  local new_jobs = args.to ~= '' and count_unfinished(new_q) or 0
  if old_jobs + new_jobs > 0 then return { 'busy', old_jobs, new_jobs } end
  set_paused(old_q, value_at(default_q.paused))
end
set_paused(default_q, args.to ~= '' and value_at(new_q.paused))
set_paused(new_q, false)
redis.call('SET', KEYS[1], args.to)
return { 'taken' }
