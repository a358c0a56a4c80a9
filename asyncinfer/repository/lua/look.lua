#!lua flags=no-writes
-- look: where the waiting jobs of a queue are, and how fast it moves; changes nothing.
-- KEYS    1 the queue, 2 the pace of its model
-- ARGV    1 {front_jobs, points, handed_back, log_entries, overdue_ms}: how many ids are read at
--         the serving end of each list, how many records of jobs further back, of how many ids the
--         facts, and how many entries of the log; overdue_ms: a lease that ends within them was not
--         renewed when it should have been
-- Returns {now in ms, jobs that the queue ever had, pace or nil, depth (as for gauge), ms for which
--         expired leases are not acted on, {list, ...} of high, normal and low priority, {ms, jobs,
--         ...}: when jobs ended and how many, the newest first, {id, lease end in ms, deliveries,
--         ...}: running jobs whose lease is overdue}; a list is {length with stale entries, {id,
--         ...} packed, the next first and without stale entries, {place in the list, record, ...},
--         {id, deliveries, ...}: jobs that wait again, since their worker was lost}
-- Bound   independent of how many jobs wait; places are found from the nearer end of a list
-- include: keys job_keys time value fact_names facts depth packed_length

local args, now = cmsgpack.unpack(ARGV[1]), now_ms()

-- The ids at the serving end of the list at key `list`, the next first, without stale entries.
local function front_of(q, list)
  local ids, front = redis.call('LRANGE', list, -args.front_jobs, -1), {}
  local has_stale = #ids > 0 and redis.call('EXISTS', q.stale) == 1
  local is_stale = has_stale and redis.call('SMISMEMBER', q.stale, unpack(ids)) or {}
  for i = #ids, 1, -1 do
    if is_stale[i] ~= 1 then front[#front + 1] = ids[i] end
  end
  return front
end

-- A flat list of places (from 0 at the serving end) and records of jobs behind the front of a list
-- of `length` ids, evenly apart, the last of the list among them. Jobs without a record are left
-- out.
local function points_of(list, length)
  local first, places, ids, points = args.front_jobs, {}, {}, {}
  if length <= first then return points end
  for n = 0, args.points - 1 do
    local place = first + math.floor(n * (length - 1 - first) / (args.points - 1))
    places[#places + 1], ids[#ids + 1] = place, redis.call('LINDEX', list, -place - 1)
  end
  for i, meta in ipairs(redis.call('MGET', unpack(job_keys(ids, ':meta')))) do
    if meta then points[#points + 1], points[#points + 2] = places[i], meta end
  end
  return points
end

-- The number of deliveries in packed facts; 0 for none, and for facts that are corrupt.
local function deliveries_in(packed)
  return (decode_table(packed) or {})[DELIVERIES] or 0
end

-- A flat list of ids and deliveries of the jobs next in turn whose worker was lost: they were put
-- back at the serving end.
local function handed_back(q, front)
  local ids, found = {}, {}
  for i = 1, math.min(#front, args.handed_back) do ids[i] = front[i] end
  if #ids == 0 or redis.call('EXISTS', q.facts) == 0 then return found end
  for i, packed in ipairs(redis.call('HMGET', q.facts, unpack(ids))) do
    local deliveries = deliveries_in(packed)
    if deliveries > 0 then found[#found + 1], found[#found + 2] = ids[i], deliveries end
  end
  return found
end

-- One of the lists of the reply.
local function list_of(q, list)
  local length, front = redis.call('LLEN', list), front_of(q, list)
  return { length, cmsgpack.pack(front), points_of(list, length), handed_back(q, front) }
end

-- A flat list of when jobs ended (completed or failed) and how many, by the newest entries of the
-- log.
local function ended_lately(q)
  local ended = {}
  for _, entry in ipairs(redis.call('XREVRANGE', q.log, '+', '-', 'COUNT', args.log_entries)) do
    local fields, jobs = entry[2], 0
    for i = 1, #fields, 2 do
      if fields[i] == 'completed' or fields[i] == 'failed' then
        jobs = jobs + packed_length(fields[i + 1])
      end
    end
    if jobs > 0 then
      ended[#ended + 1], ended[#ended + 2] = tonumber(entry[1]:match('^%d+')), jobs
    end
  end
  return ended
end

-- A flat list of ids, lease ends and deliveries of running jobs whose lease is overdue: those of up
-- to 64 claims.
local function overdue(q)
  local max_claims, found = 64, {}
  local claims = redis.call('ZRANGEBYSCORE', q.leases, '-inf', now + args.overdue_ms,
    'WITHSCORES', 'LIMIT', 0, max_claims)
  for n = 1, #claims, 2 do
    local token, ends_at = claims[n], math.floor(tonumber(claims[n + 1]))
    local ids = decode_table(value_at(q['claim:' .. token])) or {}
    if #ids > 0 and #ids <= 256 then
      local tokens = redis.call('HMGET', q.running, unpack(ids))
      local facts = redis.call('HMGET', q.facts, unpack(ids))
      for i, id in ipairs(ids) do
        if tokens[i] == token then
          local at = #found
          found[at + 1], found[at + 2], found[at + 3] = id, ends_at, deliveries_in(facts[i])
        end
      end
    end
  end
  return found
end

local q = queue(KEYS[1])
return {
  now,
  tonumber(value_at(q.seq) or 0) or 0,
  value_at(KEYS[2]),
  depth_of(q),
  math.max(0, redis.call('PTTL', q.hold)),
  { list_of(q, q.high), list_of(q, q.list), list_of(q, q.low) },
  ended_lately(q),
  overdue(q),
}
