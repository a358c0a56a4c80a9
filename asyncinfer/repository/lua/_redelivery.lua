-- include: job_keys priority
-- The return of a claimed job that has not ended.

-- Makes a claimed job wait again at the serving end of the list of its priority, so that it is
-- next. `facts` are unpacked, or nil, and are not stored. The caller adjusts the claim, the number
-- of waiting bytes, the log and the doorbell.
local function put_back(q, id, facts)
  redis.call('SET', job_key(id, 'status'), 'pending')
  redis.call('HDEL', q.running, id)
  redis.call('RPUSH', priority_list(q, facts), id)
end
