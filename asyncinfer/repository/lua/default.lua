#!lua flags=allow-oom
-- default: makes another model the default one, unless a job would change its model by that
-- KEYS    1 the name of the default model, 2 the queue of the default model, 3 the queue that the
--         old one has when it is not the default, 4 the queue that the new one has had so far
-- ARGV    1 {from, to}: names; from "" where it was decided that there is none, to "" to decide it
-- Returns {"taken"} | {"changed"}: the default is not `from` (any more)
--         | {"busy", jobs in 2, jobs in 4}: what waits, is delayed or runs there
-- Order   jobs and name in one step, so that a submit comes before both or after both
-- Retry   a second call finds it changed; the caller reads the name again

local a = cmsgpack.unpack(ARGV[1])
local default, old, new = queue(KEYS[2]), queue(KEYS[3]), queue(KEYS[4])

-- A model stays paused, or not, when its jobs are in another queue from now on.
local function pause(q, is_paused)
  if is_paused then redis.call('SET', q.paused, '1') else redis.call('DEL', q.paused) end
end

if value_at(KEYS[1]) ~= a.from then return { 'changed' } end
if a.from ~= '' then
  local of_old, of_new = unended(default), a.to ~= '' and unended(new) or 0
  if of_old + of_new > 0 then return { 'busy', of_old, of_new } end
  pause(old, value_at(default.paused))
end
pause(default, a.to ~= '' and value_at(new.paused))
pause(new, false)
redis.call('SET', KEYS[1], a.to)
return { 'taken' }
