#!lua flags=allow-oom
-- retry: opens a new round of failed or cancelled jobs.
-- KEYS    1 the queue, 2 the set of all queues
-- ARGV    1 {max_queue, max_bytes}; then per job: id, the meta it must still have, the meta of
--         the new round ("" for a stranger's), extra as in submit
-- Returns per job "ok" | "changed" | "full" | "no_input" | "not_retryable" | "absent"
-- Retry   answers changed; the caller reads the record again and finds its new round

local q, a, now = queue(KEYS[1]), cmsgpack.unpack(ARGV[1]), now_ms()
local free, free_bytes = room(q, a)
local verdicts, opened, bytes = {}, {}, 0

local function judge(id, expected)
  local status = value_at(job(id, 'status'))
  if not status then return 'absent' end
  if (value_at(job(id, 'meta')) or '') ~= expected then return 'changed' end
  if status ~= 'failed' and status ~= 'cancelled' then return 'not_retryable' end
  local size = input_bytes(id)
  if size == 0 then return 'no_input' end
  if free < 1 or free_bytes < size then return 'full' end
  return 'ok', size
end

-- A ghost of the last round, still in its list, would now be the same job a second time.
local function lay_ghost(id, extra)
  if redis.call('SREM', q.ghosts, id) == 1 then redis.call('LREM', list_of(q, extra), -1, id) end
end

local function open(id, meta, extra, size)
  redis.call('PERSIST', job(id, 'data'))
  redis.call('DEL', job(id, 'result'), job(id, 'error'))
  redis.call('SET', job(id, 'status'), 'pending')
  if meta ~= '' then
    redis.call('SET', job(id, 'meta'), meta)
    bytes = bytes + size
  end
  redis.call('ZREM', q.dead, id)
  lay_ghost(id, extra)
  if meta == '' then redis.call('HSET', q.facts, id, cmsgpack.pack({ r = 1 })) end
  local list, packed = q.list, nil
  if extra then list, packed = arrange(q, id, extra, now) end
  if packed then redis.call('HSET', q.facts, id, packed) end
  if list then redis.call('LPUSH', list, id) end
  opened[#opened + 1] = id
end

for i = 2, #ARGV, 4 do
  local verdict, size = judge(ARGV[i], ARGV[i + 1])
  if verdict == 'ok' then
    local extra = ARGV[i + 3]
    open(ARGV[i], ARGV[i + 2], extra ~= '' and cmsgpack.unpack(extra) or nil, size)
    free, free_bytes = free - 1, free_bytes - size
  end
  verdicts[#verdicts + 1] = verdict
end
if #opened > 0 then
  settle(q, bytes)
  redis.call('SADD', KEYS[2], q.list)
  record(q, { pending = opened })
  ring(q)
end
return verdicts
