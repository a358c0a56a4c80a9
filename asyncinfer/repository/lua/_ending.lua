-- include: job_keys fact_names log stored_bytes kept idempotency webhook_ending
-- The end of jobs: status, result, TTLs, the log, and the notices to the APIs that wait for them.

-- Notifies APIs that wait for jobs: `notices` is {inbox = {ended, ...}}, by key of the inbox, with
-- entries of `ends` as `end_jobs` takes them. An entry of an inbox has each job's id and status,
-- and the whole job if it is small, so that the API need not read it: in a field '\1' .. id (no id
-- contains that byte) the length of its body, the body and its meta. NOMKSTREAM: the inbox of a
-- dead API must not come back.
local function notify_inboxes(notices)
  local max_entries, max_body_bytes, jobs_per_entry = 10000, 1024, 16
  for inbox, ends in pairs(notices) do
    for first = 1, #ends, jobs_per_entry do
      local fields = {}
      for i = first, math.min(first + jobs_per_entry - 1, #ends) do
        local id, body, meta, n = ends[i].id, ends[i].body, ends[i].meta, #fields
        fields[n + 1], fields[n + 2] = id, ends[i].status
        if body and meta and #body <= max_body_bytes then
          fields[n + 3], fields[n + 4] = '\1' .. id, #body .. ' ' .. body .. meta
        end
      end
      redis.pcall('XADD', inbox, 'NOMKSTREAM', 'MAXLEN', '~', max_entries, '*', unpack(fields))
    end
  end
end

-- Sets string keys with one TTL; `pairs_to_set` is {key, value, ...}, of any length. One command if
-- the server has it: a job that ends sets three keys, and they were a third of what its end cost.
local function set_with_ttl(ttl_seconds, pairs_to_set)
  local keys_per_command = 300
  for first = 1, #pairs_to_set, 2 * keys_per_command do
    local last = math.min(first + 2 * keys_per_command - 1, #pairs_to_set)
    local arguments, n = { unpack(pairs_to_set, first, last) }, last - first + 1
    arguments[n + 1], arguments[n + 2] = 'EX', ttl_seconds
    local reply = redis.pcall('MSETEX', n / 2, unpack(arguments))
    -- If the cause is not a server without MSETEX, SET raises the same error again.
    if type(reply) == 'table' and reply.err then
      for i = first, last, 2 do
        redis.call('SET', pairs_to_set[i], pairs_to_set[i + 1], 'EX', ttl_seconds)
      end
    end
  end
end

-- Removes ended jobs, at least one, from the tables of running, delayed and unusual jobs (their
-- facts and deadlines); not from the lists.
local function remove_from_tables(q, ids)
  redis.call('HDEL', q.running, unpack(ids))
  local others = redis.call('EXISTS', q.facts, q.deadlines, q.delayed)
  if others == 0 then return end
  local had_facts = redis.call('HDEL', q.facts, unpack(ids)) > 0
  if had_facts and others == 1 then return end
  redis.call('ZREM', q.deadlines, unpack(ids))
  redis.call('ZREM', q.delayed, unpack(ids))
end

-- Returns how many bytes of inputs may still be kept with jobs that end: up to half of the bound, as
-- results and errors, which are always kept, need the other half. Otherwise a client that submits
-- and cancels large jobs would make the queue refuse the jobs of all others.
local function room_for_inputs(q, args)
  return args.max_kept_bytes / 2 - (tonumber(redis.call('MGET', q.keptbytes)[1] or 0) or 0)
end

-- Ends jobs: stores their outcomes with TTLs, deletes the inputs of completed ones (unless
-- `args.keep_input`) and those for which there is no room, counts what is kept, removes the jobs
-- from the tables, and notifies log, inboxes and webhooks. The caller takes them off the lists and
-- adjusts the waiting bytes.
-- `ends` is a list of {id, status, body, meta, facts, digest}: a terminal status; body, the result or
-- the JSON for the key `error`, or nil; meta, the new record, or nil to keep the one there is; unpacked
-- facts or nil; the digest of its idempotency key, nil if it has none or only its facts may have it.
-- `args` holds ttl_seconds, failed_ttl_seconds, keep_input and max_kept_bytes. `spent` (may be nil)
-- lists keys to delete in the same command as the inputs; those are added to it. With no `ends`,
-- nothing is done: `spent` is not deleted either.
local function end_jobs(q, ends, args, spent)
  if #ends == 0 then return end
  local ids, moved, notices, by_ttl, kept, owners, with_webhook = {}, {}, {}, {}, {}, {}, {}
  local room
  spent = spent or {}
  for i, ended in ipairs(ends) do
    local id, status, facts = ended.id, ended.status, ended.facts
    local ttl = facts and facts[TTL_SECONDS]
      or (status == 'failed' and args.failed_ttl_seconds or args.ttl_seconds)
    local digest = ended.digest or facts and facts[IDEMPOTENCY_DIGEST]
    if digest then owners[#owners + 1] = { id = id, digest = digest, ttl = ttl } end
    local set, bytes = by_ttl[ttl] or {}, ended.body and #ended.body or 0
    local n = #set
    by_ttl[ttl] = set
    set[n + 1], set[n + 2] = job_key(id, 'status'), status
    if ended.body then
      n = n + 2
      set[n + 1], set[n + 2] = job_key(id, status == 'completed' and 'result' or 'error'), ended.body
    end
    if ended.meta then
      set[n + 3], set[n + 4] = job_key(id, 'meta'), ended.meta
    else
      redis.call('EXPIRE', job_key(id, 'meta'), ttl)
    end
    local size = (status ~= 'completed' or args.keep_input) and stored_bytes(id, 'data')
    if size and size >= MIN_KEPT_BYTES then
      room = room or room_for_inputs(q, args)
      if size > room then size = false else room = room - size end
    end
    if size then
      bytes = bytes + size
      redis.call('EXPIRE', job_key(id, 'data'), ttl)
    else
      spent[#spent + 1] = job_key(id, 'data')
    end
    if bytes >= MIN_KEPT_BYTES then kept[ttl] = (kept[ttl] or 0) + bytes end
    for _, inbox in ipairs(facts and facts[INBOXES] or {}) do
      notices[inbox] = notices[inbox] or {}
      table.insert(notices[inbox], ended)
    end
    if facts and facts[WEBHOOK_EVENTS] then with_webhook[#with_webhook + 1] = ended end
    local moving = moved[status] or {}
    moved[status] = moving
    moving[#moving + 1] = id
    ids[i] = id
  end
  for ttl, set in pairs(by_ttl) do
    set_with_ttl(ttl, set)
    if kept[ttl] then add_kept_bytes(q, redis.call('PEXPIRETIME', set[1]), kept[ttl]) end
  end
  if #owners > 0 then expire_idempotency_keys(q, owners) end
  if #spent > 0 then redis.call('DEL', unpack(spent)) end
  remove_from_tables(q, ids)
  if #with_webhook > 0 then end_webhooks(q, with_webhook, args.failed_ttl_seconds) end
  log_transitions(q, moved)
  notify_inboxes(notices)
end

-- The error of a job that a script ends at `now`, in ms: JSON of the members in `text`, '' for none.
-- No script rewrites a record, so it has what a worker would have put there: when the job ended, and
-- its lost deliveries. `facts` may be nil.
local function error_with_end(text, facts, now)
  local lost = {}
  for i, entry in ipairs(facts and facts[LOST_DELIVERIES] or {}) do
    lost[i] = '"' .. entry:gsub('[^%w .:_-]', '?') .. '"'
  end
  local listed = #lost > 0 and ',"lost":[' .. table.concat(lost, ',') .. ']' or ''
  return '{' .. text .. '"at_ms":' .. now .. listed .. '}'
end

-- An entry of `ends` for a job that fails at `now`, in ms, for a reason only the queue knows; ends
-- nothing. `code` and `message` are put into JSON as they are, so they must need no escapes; `facts`
-- may be nil.
local function failed_job(id, code, message, facts, now)
  local text = '"code":"' .. code .. '","message":"' .. message .. '",'
  local body = error_with_end(text, facts, now)
  return { id = id, status = 'failed', code = code, body = body, facts = facts }
end

-- An entry of `ends` for a job that is cancelled at `now`, in ms; ends nothing. `facts` may be nil.
local function cancelled_job(id, facts, now)
  return { id = id, status = 'cancelled', body = error_with_end('', facts, now), facts = facts }
end

-- Stale entries are ids of ended jobs that are still in a list. A claim drops them when it meets
-- them; until then they are left out of the number of waiting jobs. `command` is SADD for ids that
-- have become stale entries, and SREM for ids that have left the lists. `ids` may be empty (then
-- nothing is done), and are at most as many as `unpack` can pass to one command.
local function update_stale_entries(q, command, ids)
  if #ids > 0 then redis.call(command, q.stale, unpack(ids)) end
end
