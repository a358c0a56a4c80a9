-- The claim itself, shared by `claim` and by `finish`, which claims next in the same step.

local MOST_PASSED = 1000
-- An id that is longer is dropped without a word: the log would have to hold it.
local LONGEST_TOLD = 1024

-- What becomes of an id found in a list. Effects come later, all at once.
local function judge(found, now)
  local status, facts = found.status, found.facts
  if #found.id == 0 or #found.id > 128 or found.id:find('%c') then return 'junk' end
  local stranger = not status and not found.meta
  if status ~= 'pending' and not (stranger and found.bytes > 0) then
    return status and 'drop' or 'gone'
  end
  if found.bytes == 0 then return 'lost' end
  if facts and ((facts.b and facts.b < now) or (facts.l and facts.l < now)) then return 'expired' end
  if facts and (facts.d or facts.s) then return 'lone' end
  return 'take'
end

-- What is at these ids; with `whole` the inputs as well, unless one is a stranger's: its size is
-- not known before it is read.
local function look(q, ids, whole)
  local names = each(ids, ':status')
  for i, name in ipairs(each(ids, ':meta')) do names[#ids + i] = name end
  local values = redis.call('MGET', unpack(names))
  local facts = facts_of(q, ids)
  for i = 1, #ids do whole = whole and values[#ids + i] end
  local inputs = whole and redis.call('MGET', unpack(each(ids, ':data')))
  local found = {}
  for i, id in ipairs(ids) do
    found[i] = {
      id = id, status = values[i], meta = values[#ids + i], input = inputs and inputs[i],
      bytes = inputs and #(inputs[i] or '') or input_bytes(id),
      packed = facts[i] or false, facts = unpacked(facts[i]),
    }
  end
  return found
end

-- The ids at the serving end of a list behind the first `skip`, the next to be served first.
local function peek(list, skip, count)
  local ids = redis.call('LRANGE', list, -skip - count, -skip - 1)
  for i = 1, math.floor(#ids / 2) do ids[i], ids[#ids + 1 - i] = ids[#ids + 1 - i], ids[i] end
  return ids
end

-- The tail of a claim's reply: id, data, meta, facts of each job.
local function describe(jobs)
  local ids, inputs, unread, reply = {}, {}, false, {}
  for i, found in ipairs(jobs) do
    ids[i], inputs[i] = found.id, found.input
    unread = unread or not found.input
  end
  if unread then inputs = redis.call('MGET', unpack(each(ids, ':data'))) end
  for i, found in ipairs(jobs) do
    local at = 4 * i - 4
    reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] =
      found.id, inputs[i], found.meta, found.packed
  end
  return reply
end

-- A token that already holds a claim gets that claim back: a lost reply costs nothing.
local function again(q, a, now, known)
  local ids, mine = unpacked(known) or {}, {}
  local tokens = #ids > 0 and redis.call('HMGET', q.running, unpack(ids)) or {}
  for i, id in ipairs(ids) do
    if tokens[i] == a.token then mine[#mine + 1] = id end
  end
  redis.call('ZADD', q.leases, 'XX', now + a.lease, a.token)
  return { now, q.list, 0, unpack(describe(#mine > 0 and look(q, mine) or {})) }
end

-- Decides, without a write, what a claim takes, ends and drops, and how far it cuts each list.
local function plan(q, a, now, lists, whole)
  local p = { taken = {}, ends = {}, gone = {}, ended = {}, cuts = {}, bytes = 0, freed = 0 }
  local seen, passed = {}, 0
  for _, list in ipairs(lists) do
    local cut, spent = 0, false
    while #p.taken < a.jobs and not p.stop and not spent and passed < MOST_PASSED do
      local wanted = a.jobs - #p.taken
      local ids = peek(list, cut, wanted)
      if #ids == 0 then break end
      spent = #ids < wanted
      for _, found in ipairs(look(q, ids, whole)) do
        local verdict = seen[found.id] and 'repeat' or judge(found, now)
        if verdict == 'lone' and (#p.taken > 0 or a.held) then p.stop, p.blocked = true, true end
        if verdict == 'take' and #p.taken > 0 and p.bytes + found.bytes > a.bytes then
          p.stop = true
        end
        if p.stop then break end
        cut = cut + 1
        seen[found.id] = true
        local counted = found.meta and found.bytes or 0
        if verdict == 'take' or verdict == 'lone' then
          p.taken[#p.taken + 1] = found
          p.bytes, p.freed = p.bytes + found.bytes, p.freed + counted
          p.stop = verdict == 'lone'
          if p.stop then break end
        else
          passed = passed + 1
        end
        if verdict == 'junk' and found.status == 'pending' and #found.id <= LONGEST_TOLD then
          p.ends[#p.ends + 1] = failed(
            found.id, 'invalid_id', 'A job id has 1 to 128 bytes and no control characters.')
        elseif verdict == 'lost' then
          p.ends[#p.ends + 1] = failed(
            found.id, 'input_lost', 'The input is gone from Redis; submit the job again.', found.facts)
        elseif verdict == 'expired' then
          p.ends[#p.ends + 1] = failed(
            found.id, 'expired', 'The deadline passed while the job waited.', found.facts)
          p.freed = p.freed + counted
        elseif verdict == 'gone' then
          p.gone[#p.gone + 1] = found.id
        elseif verdict == 'drop' and found.status ~= 'processing' then
          p.ended[#p.ended + 1] = found.id
        end
      end
    end
    if cut > 0 then p.cuts[#p.cuts + 1] = { list = list, cut = cut } end
  end
  return p
end

-- A start deadline has been met; the life deadline, where there is one, takes its place.
local function started(q, found)
  local facts = found.facts
  if not (facts and facts.b) then return end
  facts.b = nil
  redis.call('ZREM', q.deadlines, found.id)
  if facts.l then redis.call('ZADD', q.deadlines, facts.l, found.id) end
  found.packed = next(facts) and cmsgpack.pack(facts) or false
  if found.packed then
    redis.call('HSET', q.facts, found.id, found.packed)
  else
    redis.call('HDEL', q.facts, found.id)
  end
end

local function lease(q, a, taken, until_ms)
  local ids, statuses, owners, strangers = {}, {}, {}, {}
  for i, found in ipairs(taken) do
    ids[i] = found.id
    statuses[2 * i - 1], statuses[2 * i] = job(found.id, 'status'), 'processing'
    owners[2 * i - 1], owners[2 * i] = found.id, a.token
    local ran = found.facts and (found.facts.d or found.facts.s or found.facts.r)
    if not found.meta and not ran then strangers[#strangers + 1] = found.id end
    started(q, found)
  end
  redis.call('MSET', q['claim:' .. a.token], cmsgpack.pack(ids), unpack(statuses))
  redis.call('HSET', q.running, unpack(owners))
  redis.call('ZADD', q.leases, until_ms, a.token)
  if #strangers > 0 then count_jobs(q, #strangers) end
  record(q, { processing = ids, stranger = strangers })
end

-- How many wait in the queue's own list, and whether there is nothing beside it.
local function survey(q)
  local found = redis.call('EXISTS', q.list, q.high, q.low, q.delayed, q.ghosts)
  local count = found > 0 and redis.call('LLEN', q.list) or 0
  return count, found == (count > 0 and 1 or 0)
end

-- Takes what waits in one queue under one lease; `bytes` wait in it.
local function take(q, a, now, exactly, bytes)
  if now > a.not_after then return { now, q.list, 0 } end
  local count, plain = survey(q)
  if count == 0 and (plain or redis.call('EXISTS', q.high, q.low) == 0) then
    return { now, q.list, 0 }
  end
  local lists = plain and { q.list }
    or a.low_first and { q.low, q.list, q.high } or { q.high, q.list, q.low }
  local p = plan(q, a, now, lists, (tonumber(bytes or 0) or 0) <= a.bytes)
  for _, c in ipairs(p.cuts) do redis.call('LTRIM', c.list, 0, -c.cut - 1) end
  -- To the microsecond, so that claims of one ms keep their order when they are reaped.
  if #p.taken > 0 then lease(q, a, p.taken, exactly + a.lease) end
  terminal(q, p.ends, a)
  if #p.gone > 0 then
    redis.call('HDEL', q.facts, unpack(p.gone))
    redis.call('ZREM', q.deadlines, unpack(p.gone))
  end
  haunt(q, p.gone, false)
  haunt(q, p.ended, false)
  local left = #p.cuts > 0 and settle(q, -p.freed, plain and count - p.cuts[1].cut)
  if p.blocked or (left and left > 0) then
    ring(q)
  elseif left and not plain then
    -- A token left over would only make a worker look for nothing.
    redis.call('DEL', q.wake)
  end
  return { now, q.list, p.blocked and 1 or 0, unpack(describe(p.taken)) }
end

-- Takes from the first of several queues that has work for us. `a`: token, lease and not_after in
-- ms, held (this process holds another claim), jobs and bytes at most, unshared {queue: true} where
-- one job at a time is taken, low_first, ttl, failed_ttl.
-- Returns {now, queue, blocked, id, data, meta, facts, ...}; blocked: a job that must run alone
-- is next, and this process may not have it yet, nor any other job until it can.
local function take_first(queues, a, now, exactly)
  local qs, names = {}, {}
  for i, list in ipairs(queues) do
    local q = queue(list)
    qs[i] = q
    names[3 * i - 2], names[3 * i - 1], names[3 * i] = q['claim:' .. a.token], q.paused, q.bytes
  end
  local values = redis.call('MGET', unpack(names))
  -- All of them before any: the call that is retried may have taken from the last.
  for i, q in ipairs(qs) do
    local known = values[3 * i - 2]
    if known then return again(q, a, now, known) end
  end
  local reply
  local most, unshared = a.jobs, a.unshared or {}
  for i, q in ipairs(qs) do
    local paused, bytes = values[3 * i - 1], values[3 * i]
    a.jobs = unshared[q.list] and 1 or most
    reply = paused and { now, q.list, 0 } or take(q, a, now, exactly, bytes)
    if #reply > 3 or reply[3] == 1 then break end
  end
  return reply
end
