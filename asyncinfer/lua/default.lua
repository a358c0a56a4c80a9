#!lua flags=allow-oom
-- default: makes another model the default one, unless a job would change its model by that
-- KEYS    1 the name of the default model, 2 the queue of the default model, 3 the queue that the
--         new default model has had so far
-- ARGV    1 {from, to}: names; from "" where it was decided that there is none, to "" to decide it
-- Returns {"taken"} | {"changed"}: the default is not `from` (any more)
--         | {"busy", jobs in 2, jobs in 3}: what waits, is delayed or runs there
-- Order   jobs and name in one step, so that a submit comes before both or after both
-- Retry   a second call finds it changed; the caller reads the name again

local a = cmsgpack.unpack(ARGV[1])
if value_at(KEYS[1]) ~= a.from then return { 'changed' } end
if a.from ~= '' then
  local old = unended(queue(KEYS[2]))
  local new = KEYS[3] and unended(queue(KEYS[3])) or 0
  if old + new > 0 then return { 'busy', old, new } end
end
redis.call('SET', KEYS[1], a.to)
return { 'taken' }
