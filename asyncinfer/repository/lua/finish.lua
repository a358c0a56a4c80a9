#!lua flags=allow-oom
-- finish: stores what became of jobs of one claim, and may claim next in the same step.
-- KEYS    1 the claim's queue, 2.. the queues of the next claim (none: no next claim)
-- ARGV    1 {token, last, ttl, failed_ttl, keep_input, max_dead, next}; then per job: id,
--         outcome, body, meta with seq ("" for a stranger's), delay in ms
-- Returns {verdicts, reply of the claim or nil}; a verdict is completed | failed | cancelled |
--         retry | dead | released | suspect, or stale when this claim does not own the job, or
--         the job has ended otherwise (a stranger may put one id into two queues)
-- Order   the fence before all else; the lease goes only with `last`
-- Retry   answers stale; the caller then asks the record whose work it holds

local q, a = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local now, exactly = now_ms()
local ids, verdicts, ends, waits, freed = {}, {}, {}, {}, 0

for i = 2, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
local tokens, statuses, facts = {}, {}, {}
if #ids > 0 then
  tokens = redis.call('HMGET', q.running, unpack(ids))
  statuses = redis.call('MGET', unpack(each(ids, ':status')))
  facts = facts_of(q, ids)
end

local function wait_again(id, outcome, meta, delay, known)
  if meta ~= '' then
    redis.call('SET', job(id, 'meta'), meta)
    freed = freed - input_bytes(id)
  end
  if outcome == 'suspect' or meta == '' then
    known = known or {}
    known[outcome == 'suspect' and 's' or 'r'] = 1
    redis.call('HSET', q.facts, id, cmsgpack.pack(known))
  end
  if delay > 0 then
    redis.call('SET', job(id, 'status'), 'pending')
    redis.call('HDEL', q.running, id)
    redis.call('ZADD', q.delayed, now + delay, id)
  else
    put_back(q, id, known)
  end
  waits[#waits + 1] = id
end

local seen, returned, estranged = {}, {}, {}
for i, id in ipairs(ids) do
  local at = 5 * i - 3
  local outcome, body, meta, delay = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local known = unpacked(facts[i])
  if tokens[i] ~= a.token or seen[id] then
    outcome = 'stale'
  elseif statuses[i] ~= 'processing' then
    outcome = 'stale'
    estranged[#estranged + 1] = id
  elseif known and known.c then
    outcome = 'cancelled'
    ends[#ends + 1] = { id = id, status = outcome, meta = meta ~= '' and meta or nil, facts = known }
  elseif outcome == 'completed' or outcome == 'failed' or outcome == 'cancelled' or outcome == 'dead' then
    ends[#ends + 1] = {
      id = id, status = outcome == 'dead' and 'failed' or outcome, body = body ~= '' and body or nil,
      meta = meta ~= '' and meta or nil, facts = known,
    }
    if outcome == 'dead' then bury(q, id, now, a) end
  else
    returned[#returned + 1] = { id, outcome, meta, tonumber(delay), known }
  end
  seen[id] = true
  verdicts[i] = outcome
end
if #estranged > 0 then redis.call('HDEL', q.running, unpack(estranged)) end
local claim = q['claim:' .. a.token]
terminal(q, ends, a, a.last and { claim })
-- Last first, so that the first of them is at the very serving end: their order is kept.
for i = #returned, 1, -1 do wait_again(unpack(returned[i], 1, 5)) end
if #waits > 0 then
  settle(q, -freed)
  record(q, { pending = waits })
  ring(q)
end
if a.last then
  redis.call('ZREM', q.leases, a.token)
  if #ends == 0 then redis.call('DEL', claim) end
end
if not a.next then return { verdicts } end
local queues = {}
for i = 2, #KEYS do queues[i - 1] = KEYS[i] end
return { verdicts, take_first(queues, a.next, now, exactly) }
