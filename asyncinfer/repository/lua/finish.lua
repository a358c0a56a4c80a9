#!lua flags=allow-oom
-- finish: stores the outcomes of jobs of one claim, and may claim next in the same step.
-- KEYS    1 the claim's queue, 2.. the queues of the next claim (none: no next claim)
-- ARGV    1 {token, is_last, ttl_seconds, failed_ttl_seconds, keep_input, max_kept_bytes,
--         max_dead_letters, digests, next: ARGV 1 of claim}; then per job: id, outcome, body, meta
--         with seq ("" for an external job), delay in ms. digests: of the idempotency key of each
--         job, nil for none; nil if no job has one
-- Returns {verdicts, reply of the claim or nil}; a verdict is completed | failed | cancelled |
--         retry | dead | released | suspect, or stale: this claim does not own the job, or the job
--         has ended otherwise (an external producer may put one id into two queues)
-- Order   ownership is checked before all else; the lease goes only with `is_last`
-- Retry   the verdicts are stale; the caller then reads from the record whether it holds this work
-- include: keys job_keys time fact_names facts doorbell log stored_bytes
-- include: waiting_bytes ending redelivery dead_letters claim

local q, args = queue(KEYS[1]), cmsgpack.unpack(ARGV[1])
local now, exact_now = now_ms()
local ids, verdicts, ends, waiting_ids, freed_bytes = {}, {}, {}, {}, 0

for i = 2, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
local tokens, statuses, packed_facts = {}, {}, {}
if #ids > 0 then
  tokens = redis.call('HMGET', q.running, unpack(ids))
  statuses = redis.call('MGET', unpack(job_keys(ids, ':status')))
  packed_facts = packed_facts_of(q, ids)
end

-- Makes a job of this claim wait again, after `delay_ms` or at once (0); `outcome` is retry,
-- released or suspect. `meta` is the new record, '' for an external job, whose bytes are not
-- counted. Its facts mark a suspect, and any other external job as claimed before; `facts` are
-- unpacked or nil.
local function return_job(id, outcome, meta, delay_ms, facts)
  if meta ~= '' then
    redis.call('SET', job_key(id, 'meta'), meta)
    freed_bytes = freed_bytes - stored_bytes(id, 'data')
  end
  if outcome == 'suspect' or meta == '' then
    facts = facts or {}
    local name = outcome == 'suspect' and SUSPECT or CLAIMED_BEFORE
    facts[name] = 1
    redis.call('HSET', q.facts, id, cmsgpack.pack(facts))
  end
  if delay_ms > 0 then
    redis.call('SET', job_key(id, 'status'), 'pending')
    redis.call('HDEL', q.running, id)
    redis.call('ZADD', q.delayed, now + delay_ms, id)
  else
    put_back(q, id, facts)
  end
  waiting_ids[#waiting_ids + 1] = id
end

local seen, returned, ended_elsewhere, digests = {}, {}, {}, args.digests or {}
for i, id in ipairs(ids) do
  local at = 5 * i - 3
  local outcome, body, meta, delay_ms = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local facts = decode_table(packed_facts[i])
  if tokens[i] ~= args.token or seen[id] then
    outcome = 'stale'
  elseif statuses[i] ~= 'processing' then
    outcome = 'stale'
    ended_elsewhere[#ended_elsewhere + 1] = id
  elseif facts and facts[CANCEL_REQUESTED] then
    outcome = 'cancelled'
    local cancelled = cancelled_job(id, facts, now)
    cancelled.meta, cancelled.digest = meta ~= '' and meta or nil, digests[i]
    ends[#ends + 1] = cancelled
  elseif outcome == 'completed' or outcome == 'failed' or outcome == 'cancelled' or outcome == 'dead' then
    ends[#ends + 1] = {
      id = id, status = outcome == 'dead' and 'failed' or outcome, body = body ~= '' and body or nil,
      meta = meta ~= '' and meta or nil, facts = facts, digest = digests[i],
    }
    if outcome == 'dead' then add_dead_letter(q, id, now, args) end
  else
    returned[#returned + 1] = { id, outcome, meta, tonumber(delay_ms), facts }
  end
  seen[id] = true
  verdicts[i] = outcome
end
if #ended_elsewhere > 0 then redis.call('HDEL', q.running, unpack(ended_elsewhere)) end
local claim = q['claim:' .. args.token]
end_jobs(q, ends, args, args.is_last and { claim })
-- The last one first, so that the first one is at the very serving end: they keep their order.
for i = #returned, 1, -1 do return_job(unpack(returned[i], 1, 5)) end
if #waiting_ids > 0 then
  adjust_waiting_bytes(q, -freed_bytes)
  log_transitions(q, { pending = waiting_ids })
  ring_doorbell(q)
end
if args.is_last then
  redis.call('ZREM', q.leases, args.token)
  if #ends == 0 then redis.call('DEL', claim) end
end
if not args.next then return { verdicts } end
local queues = {}
for i = 2, #KEYS do queues[i - 1] = KEYS[i] end
return { verdicts, claim_from_any(queues, args.next, now, exact_now) }
