#!lua flags=no-writes
-- tally: how many jobs moved in queues lately, by their logs; changes nothing.
-- KEYS    queues
-- ARGV    1 {window_ms, max_entries, max_jobs, max_samples}: of each queue at most max_entries
--         entries and max_jobs jobs are counted, and the records of the max_samples jobs that
--         ended last are read
-- Returns per queue {ms that were counted, submitted, completed, failed, {record, ...}}, nil if
--         its log is no stream
-- Bound   one page of entries more than max_entries; a busy queue is counted over less than the
--         window
-- include: keys job_keys time facts packed_length

local PAGE_ENTRIES = 100

local args, now = cmsgpack.unpack(ARGV[1]), now_ms()

-- Appends the ids packed in a log entry's field to the list `ids`, until that has
-- `args.max_samples`; none if the field is corrupt.
local function append_ids(ids, packed)
  for _, id in ipairs(decode_table(packed) or {}) do
    if #ids >= args.max_samples then return end
    ids[#ids + 1] = id
  end
end

-- External jobs are not submitted here; the log shows them first under `stranger`.
local COUNTED_AS = {
  submitted = 'submitted', stranger = 'submitted', completed = 'completed', failed = 'failed',
}

-- Adds the jobs of one log entry to the counts submitted, completed, failed, and jobs (all moves)
-- of a tally. `fields` is a flat list of status and packed ids, in turn.
local function add_entry(tally, fields)
  for i = 1, #fields, 2 do
    local word, size = COUNTED_AS[fields[i]], packed_length(fields[i + 1])
    if word then tally[word] = tally[word] + size end
    tally.jobs = tally.jobs + size
  end
end

-- Appends the ids of completed and failed jobs of a log entry to `tally.ended`, up to
-- `args.max_samples` in all; `fields` as in `add_entry`.
local function collect_ended_ids(tally, fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'completed' or fields[i] == 'failed' then append_ids(tally.ended, fields[i + 1]) end
  end
end

-- Returns the tally of a queue's log and how many ms it covers: the window, or less if a bound was
-- reached first. Goes backwards from the newest entry. The first page is read for samples even if
-- it is older than the window, as that of a queue at rest is. Raises if the log is no stream.
local function count_moved(q)
  local tally = { submitted = 0, completed = 0, failed = 0, jobs = 0, entries = 0, ended = {} }
  local last, since = '+', now - args.window_ms
  while tally.entries < args.max_entries and tally.jobs < args.max_jobs do
    local page = redis.call('XREVRANGE', q.log, last, '-', 'COUNT', PAGE_ENTRIES)
    for _, entry in ipairs(page) do
      tally.at = tonumber(entry[1]:match('^%d+'))
      if tally.at >= since then add_entry(tally, entry[2]) end
      collect_ended_ids(tally, entry[2])
    end
    tally.entries = tally.entries + #page
    if #page < PAGE_ENTRIES or tally.at < since then return tally, args.window_ms end
    last = '(' .. page[#page][1]
  end
  return tally, math.max(1, now - tally.at)
end

-- A list of the metas of jobs, as bytes, in the order of `ids`; jobs without one are left out.
local function read_records(ids)
  local records = {}
  for _, meta in ipairs(#ids > 0 and redis.call('MGET', unpack(job_keys(ids, ':meta'))) or {}) do
    if meta then records[#records + 1] = meta end
  end
  return records
end

local replies = {}
for i, list in ipairs(KEYS) do
  local ok, tally, counted_ms = pcall(count_moved, queue(list))
  replies[i] = ok
    and { counted_ms, tally.submitted, tally.completed, tally.failed, read_records(tally.ended) }
end
return replies
