-- The prelude: what it means to end a job, to put one back, to ring, to tell who waits.
-- Prepended to the scripts that move jobs. Lua moves bytes, Python builds them.

local WAKE_TOKENS = 64
local LOG_ENTRIES = 100000
local CONTROL_ENTRIES = 1000
local CONTROL_SECONDS = 3600
local INBOX_ENTRIES = 10000
local WATCHERS = 32
local NOTICE_BYTES = 1024
local NOTICE_JOBS = 16
local SET_AT_ONCE = 300
local LONGEST_TTL = 10 * 365 * 24 * 3600
local FEW_JOBS = 16

-- Ms since 1970, and the same to the microsecond.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000), time[1] * 1000 + time[2] / 1000
end

-- A queue's keys: `queue(Q).running` is `{Q}:running`, whatever the word; `.list` is Q itself.
local function queue(list)
  local prefix = '{' .. list .. '}:'
  return setmetatable({ list = list }, {
    __index = function(keys, word)
      local key = prefix .. word
      rawset(keys, word, key)
      return key
    end,
  })
end

local function job(id, word)
  return 'job:' .. id .. ':' .. word
end

local function each(ids, word)
  local keys = {}
  for i, id in ipairs(ids) do keys[i] = 'job:' .. id .. word end
  return keys
end

-- What each fact must be; the packed ids of a claim are strings.
local TYPES = {
  d = 'number', s = 'number', c = 'number', e = 'number', b = 'number', l = 'number', t = 'number',
  r = 'number', p = 'string', w = 'table',
}

-- A whole number, and for `t` a time that Redis takes as one.
local function is_count(name, value)
  local most = name == 't' and LONGEST_TTL or 2 ^ 53
  return value >= (name == 't' and 1 or 0) and value <= most and value % 1 == 0
end

local function sound(value)
  if type(value) ~= 'table' then return false end
  for name, part in pairs(value) do
    local kind = type(part)
    if kind ~= (type(name) == 'number' and 'string' or TYPES[name] or kind) then return false end
    if kind == 'number' and TYPES[name] and not is_count(name, part) then return false end
    if name == 'w' and not sound(part) then return false end
  end
  return true
end

-- The string at a key; false where there is none, or something else.
local function value_at(key)
  return redis.call('MGET', key)[1]
end

-- What is packed in a value; nil when it is damaged, as when there is none.
local function unpacked(packed)
  if not packed then return nil end
  local ok, value = pcall(cmsgpack.unpack, packed)
  return ok and sound(value) and value or nil
end

local function list_of(q, facts)
  local priority = facts and facts.p
  return (priority == 'high' or priority == 'low') and q[priority] or q.list
end

-- Bytes of a job's input; 0 when it is gone or is not a string (a stranger's mistake).
local function input_bytes(id)
  local size = redis.pcall('STRLEN', job(id, 'data'))
  return type(size) == 'number' and size or 0
end

-- Bytes that count as waiting: a stranger's job (no meta) was never counted in.
local function counted_bytes(id)
  return redis.call('EXISTS', job(id, 'meta')) == 1 and input_bytes(id) or 0
end

-- A bell, the log and what is told to others may be lost: a key of another type in their place
-- must not stop a job half way, since a script is not rolled back.
local function ring(q)
  local tokens = redis.pcall('LPUSH', q.wake, '1')
  if type(tokens) == 'number' and tokens > WAKE_TOKENS then
    redis.call('LTRIM', q.wake, 0, WAKE_TOKENS - 1)
  end
end

-- What is packed of jobs' facts; where hardly any has some, the key itself is mostly not there.
local function facts_of(q, ids)
  if #ids > FEW_JOBS and redis.call('EXISTS', q.facts) == 0 then return {} end
  return redis.call('HMGET', q.facts, unpack(ids))
end

-- Whether a queue has its own list only, as nearly always: then there is less to look at, and a
-- look costs more than a microsecond.
local function is_plain(q)
  return redis.call('EXISTS', q.high, q.low, q.delayed, q.ghosts) == 0
end

local function waiting(q)
  return redis.call('LLEN', q.high) + redis.call('LLEN', q.list) + redis.call('LLEN', q.low)
end

-- Adds to the bytes that wait; where something else than a number is counted, begins anew.
local function count_bytes(q, bytes)
  local sum = redis.pcall('INCRBY', q.bytes, bytes)
  if type(sum) ~= 'number' or sum < 0 then redis.call('SET', q.bytes, math.max(0, bytes)) end
end

-- The number of jobs there have been, with `more` of them; one that is damaged begins anew.
local function count_jobs(q, more)
  local seq = redis.pcall('INCRBY', q.seq, more)
  if type(seq) == 'number' and seq >= more then return seq end
  redis.call('SET', q.seq, more)
  return more
end

-- Corrects the count of bytes that wait; nothing waiting means nothing to count, no ghosts, and
-- nothing that a bell would be for.
-- Returns how many wait; `left` is that where it is known, and nothing is delayed.
local function settle(q, bytes, left)
  local count = left or waiting(q)
  if count == 0 and (left or redis.call('ZCARD', q.delayed) == 0) then
    redis.call('DEL', q.bytes, q.ghosts, q.wake)
  elseif bytes ~= 0 then
    count_bytes(q, bytes)
  end
  return count
end

-- A ghost is the id of an ended job that is still in a list: `now` it is one, or no longer.
local function haunt(q, ids, now)
  if #ids > 0 then redis.call(now and 'SADD' or 'SREM', q.ghosts, unpack(ids)) end
end

-- One entry for a batch of transitions: `moved` is {status = {id, ...}}.
local function record(q, moved)
  local fields = {}
  for status, ids in pairs(moved) do
    if #ids > 0 then
      fields[#fields + 1] = status
      fields[#fields + 1] = cmsgpack.pack(ids)
    end
  end
  if #fields > 0 then
    redis.pcall('XADD', q.log, 'MAXLEN', '~', LOG_ENTRIES, '*', unpack(fields))
  end
end

-- Tells the workers of a queue: `what` is cancel, expire, pause, resume.
local function tell_workers(q, what, id)
  redis.pcall('XADD', q.control, 'MAXLEN', '~', CONTROL_ENTRIES, '*', what, id)
  redis.call('EXPIRE', q.control, CONTROL_SECONDS)
end

-- Tells the APIs that wait for jobs: `news` is {inbox = {ended, ...}}. An entry has each job's id
-- and status, and of a small one all there is to tell, so that nobody need ask: under '\1' and its
-- id (no id has that in it) the length of its body, the body and its meta.
-- NOMKSTREAM: a dead API's inbox must not come back.
local function notify(news)
  for inbox, ends in pairs(news) do
    for first = 1, #ends, NOTICE_JOBS do
      local notice = {}
      for i = first, math.min(first + NOTICE_JOBS - 1, #ends) do
        local id, body, meta, n = ends[i].id, ends[i].body, ends[i].meta, #notice
        notice[n + 1], notice[n + 2] = id, ends[i].status
        if body and meta and #body <= NOTICE_BYTES then
          notice[n + 3], notice[n + 4] = '\1' .. id, #body .. ' ' .. body .. meta
        end
      end
      redis.pcall('XADD', inbox, 'NOMKSTREAM', 'MAXLEN', '~', INBOX_ENTRIES, '*', unpack(notice))
    end
  end
end

-- Sets keys for a time: `set` is {key, value, ...}. In one command where the server has it: a job
-- that ends sets three keys, and they were a third of what its end cost.
local function set_for(ttl, set)
  for first = 1, #set, 2 * SET_AT_ONCE do
    local last = math.min(first + 2 * SET_AT_ONCE - 1, #set)
    local arguments = { unpack(set, first, last) }
    arguments[#arguments + 1], arguments[#arguments + 2] = 'EX', ttl
    local reply = redis.pcall('MSETEX', (last - first + 1) / 2, unpack(arguments))
    -- Whatever it was that went wrong, SET says it again.
    if type(reply) == 'table' and reply.err then
      for i = first, last, 2 do redis.call('SET', set[i], set[i + 1], 'EX', ttl) end
    end
  end
end

-- Whatever else jobs were in, they are not any more.
local function forget(q, ids)
  redis.call('HDEL', q.running, unpack(ids))
  local others = redis.call('EXISTS', q.facts, q.deadlines, q.delayed)
  if others == 0 then return end
  local had_facts = redis.call('HDEL', q.facts, unpack(ids)) > 0
  if had_facts and others == 1 then return end
  redis.call('ZREM', q.deadlines, unpack(ids))
  redis.call('ZREM', q.delayed, unpack(ids))
end

-- Ends jobs: `ends` is a list of {id, status, body, meta, facts}; `a` carries ttl, failed_ttl
-- and keep_input; `spent` are keys that go with the jobs' inputs.
local function terminal(q, ends, a, spent)
  if #ends == 0 then return end
  local ids, moved, news, kept = {}, {}, {}, {}
  spent = spent or {}
  for i, ended in ipairs(ends) do
    local id, status, facts = ended.id, ended.status, ended.facts
    local ttl = facts and facts.t or (status == 'failed' and a.failed_ttl or a.ttl)
    kept[ttl] = kept[ttl] or {}
    local set = kept[ttl]
    set[#set + 1], set[#set + 2] = job(id, 'status'), status
    if ended.body then
      set[#set + 1], set[#set + 2] = job(id, status == 'completed' and 'result' or 'error'), ended.body
    end
    if ended.meta then
      set[#set + 1], set[#set + 2] = job(id, 'meta'), ended.meta
    else
      redis.call('EXPIRE', job(id, 'meta'), ttl)
    end
    if status == 'completed' and not a.keep_input then
      spent[#spent + 1] = job(id, 'data')
    else
      redis.call('EXPIRE', job(id, 'data'), ttl)
    end
    for _, inbox in ipairs(facts and facts.w or {}) do
      news[inbox] = news[inbox] or {}
      table.insert(news[inbox], ended)
    end
    moved[status] = moved[status] or {}
    table.insert(moved[status], id)
    ids[i] = id
  end
  for ttl, set in pairs(kept) do set_for(ttl, set) end
  if #spent > 0 then redis.call('DEL', unpack(spent)) end
  forget(q, ids)
  record(q, moved)
  notify(news)
end

-- Ends a job as failed for a reason that only the queue knows.
local function failed(id, code, message, facts)
  local body = '{"code":"' .. code .. '","message":"' .. message .. '"}'
  return { id = id, status = 'failed', body = body, facts = facts }
end

local function bury(q, id, now, a)
  redis.pcall('ZADD', q.dead, now, id)
  redis.pcall('ZREMRANGEBYRANK', q.dead, 0, -a.max_dead - 1)
end

-- Makes a job wait again, at the serving end of its own priority: next in turn.
local function put_back(q, id, facts)
  redis.call('SET', job(id, 'status'), 'pending')
  redis.call('HDEL', q.running, id)
  redis.call('RPUSH', list_of(q, facts), id)
end

-- Arranges the unusual of a new round: `x` is {p, t, w, b, l, y}, times in ms from now.
-- Returns the list the job joins, or nil when it waits in `delayed`; and its packed facts.
local function arrange(q, id, x, now)
  local facts = {
    p = x.p,
    t = x.t,
    w = x.w and { x.w } or nil,
    b = x.b and now + x.b or nil,
    l = x.l and now + x.l or nil,
  }
  local packed = next(facts) and cmsgpack.pack(facts) or nil
  if facts.b or facts.l then
    local due = math.min(facts.b or math.huge, facts.l or math.huge)
    redis.call('ZADD', q.deadlines, due, id)
  end
  if x.y then
    redis.call('ZADD', q.delayed, now + x.y, id)
    return nil, packed
  end
  return list_of(q, facts), packed
end

-- How many more jobs and bytes a queue takes; `plain` where that is known.
local function room(q, a, plain)
  local count = (plain or is_plain(q)) and redis.call('LLEN', q.list)
    or waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.ghosts)
  local bytes = tonumber(value_at(q.bytes) or 0) or 0
  return a.max_queue - count, a.max_bytes - bytes
end

-- How many jobs of a queue have not ended: they wait, are delayed, or run.
local function unended(q)
  local waits = waiting(q) + redis.call('ZCARD', q.delayed) - redis.call('SCARD', q.ghosts)
  return math.max(0, waits) + redis.call('HLEN', q.running)
end
