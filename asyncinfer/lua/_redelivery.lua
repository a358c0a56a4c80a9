-- include: job_keys priority
-- What becomes of a claimed job that has not ended: it waits again, or is a dead letter.

-- Makes a job wait again at the serving end of the list of its priority, so that it is next.
local function put_back(q, id, facts)
  redis.call('SET', job_key(id, 'status'), 'pending')
  redis.call('HDEL', q.running, id)
  redis.call('RPUSH', priority_list(q, facts), id)
end

-- Adds a failed job to the dead letters, of which the newest `args.max_dead_letters` stay. A key of another type in place of the set stops no
-- script half way.
local function add_dead_letter(q, id, now, args)
  redis.pcall('ZADD', q.dead, now, id)
  redis.pcall('ZREMRANGEBYRANK', q.dead, 0, -args.max_dead_letters - 1)
end
