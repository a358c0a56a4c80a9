#!lua flags=allow-oom
-- tally: what moved in queues lately, as their logs have it; changes nothing.
-- KEYS    queues
-- ARGV    1 {window, entries, jobs, samples} window in ms; of each queue no more than so many
--         entries and jobs are counted, and the records of so many jobs read that ended last
-- Returns per queue {ms that were counted, submitted, completed, failed, {record, ...}}, nil where
--         its log is no stream
-- Bound   one page of entries more than asked; a busy queue is counted over less than the window

local PAGE = 100

local a, now = cmsgpack.unpack(ARGV[1]), now_ms()

-- How many ids are packed in a field, as its first bytes say.
local function length(packed)
  local first, second, third = packed:byte(1, 3)
  if first == 0xdc and third then return second * 256 + third end
  return first and first >= 0x90 and first <= 0x9f and first - 0x90 or 0
end

local function collect(ids, packed)
  for _, id in ipairs(unpacked(packed) or {}) do
    if #ids >= a.samples then return end
    ids[#ids + 1] = id
  end
end

local KINDS = { submitted = 'submitted', stranger = 'submitted', completed = 'completed', failed = 'failed' }

local function add(t, fields)
  for i = 1, #fields, 2 do
    local kind, size = KINDS[fields[i]], length(fields[i + 1])
    if kind then t[kind] = t[kind] + size end
    t.jobs = t.jobs + size
  end
end

local function sample(t, fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'completed' or fields[i] == 'failed' then collect(t.ended, fields[i + 1]) end
  end
end

-- Backwards from the newest entry; the first page also for the samples of a queue at rest.
local function count(q)
  local t = { submitted = 0, completed = 0, failed = 0, jobs = 0, entries = 0, ended = {} }
  local last, since = '+', now - a.window
  while t.entries < a.entries and t.jobs < a.jobs do
    local page = redis.call('XREVRANGE', q.log, last, '-', 'COUNT', PAGE)
    for _, entry in ipairs(page) do
      t.at = tonumber(entry[1]:match('^%d+'))
      if t.at >= since then add(t, entry[2]) end
      sample(t, entry[2])
    end
    t.entries = t.entries + #page
    if #page < PAGE or t.at < since then return t, a.window end
    last = '(' .. page[#page][1]
  end
  return t, math.max(1, now - t.at)
end

local function records(ids)
  local found = {}
  for _, meta in ipairs(#ids > 0 and redis.call('MGET', unpack(each(ids, ':meta'))) or {}) do
    if meta then found[#found + 1] = meta end
  end
  return found
end

local tallies = {}
for i, list in ipairs(KEYS) do
  local ok, t, counted = pcall(count, queue(list))
  tallies[i] = ok and { counted, t.submitted, t.completed, t.failed, records(t.ended) }
end
return tallies
