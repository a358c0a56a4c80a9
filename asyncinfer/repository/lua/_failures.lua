-- The jobs that a script fails of its own accord, as its reply reports them to be logged and counted.

-- What a reply says of the jobs in `lists`, each as `end_jobs` takes it, that `failed_job` made:
-- {queue, {code, number of jobs, ...}, {id, code, token, ...}}; false if there are none. At most as
-- many jobs are named as a process logs in a second; `token` is of the claim that was lost, else ''.
local function failures_of(q, lists)
  local max_named, numbers, counts, named = 10, {}, {}, {}
  for _, ends in ipairs(lists) do
    for _, ended in ipairs(ends) do
      local code, n = ended.code, #named
      if code then numbers[code] = (numbers[code] or 0) + 1 end
      if code and n < 3 * max_named then
        named[n + 1], named[n + 2], named[n + 3] = ended.id, code, ended.token or ''
      end
    end
  end
  for code, number in pairs(numbers) do
    counts[#counts + 1], counts[#counts + 2] = code, number
  end
  return #counts > 0 and { q.list, counts, named }
end
