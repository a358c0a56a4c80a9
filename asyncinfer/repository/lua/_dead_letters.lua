-- Dead letters: jobs that failed though another try may have helped.

-- Lists a job as a dead letter that failed at `now`, in ms, and keeps the newest
-- `args.max_dead_letters`; does not end the job. A key of another type in place of the set loses
-- the letter and stops no script half way.
local function add_dead_letter(q, id, now, args)
  redis.pcall('ZADD', q.dead, now, id)
  redis.pcall('ZREMRANGEBYRANK', q.dead, 0, -args.max_dead_letters - 1)
end
