-- The names of a queue's keys: `queue(Q).running` is `{Q}:running`, and `.list` is Q itself, the
-- list of jobs of normal priority.
-- Words   high low wake running leases facts deadlines delayed seq bytes kept keptbytes stale
--         paused dead log logmarks control reapgate swept hold outbox undelivered
--         webhooks webhookbytes; in brackets 'claim:' .. token, 'idem:' .. digest,
--         'webhook:' .. id. Of the default model's queue, whose name is N: closing closers; in
--         brackets 'group:' .. digest, 'closed:' .. digest
-- Each word is the key's own name, except `stale`: its key is `ghosts` in every release.

local MAX_QUEUES = 1000
local queues, queue_count = {}, 0

-- The `q` that functions take: a table with the names of the keys of the queue `list`. Reads
-- nothing; a name is built when it is first used, from any word. A library keeps the tables from
-- call to call, without the names that have a token or a digest.
local function queue(list)
  local q = queues[list]
  if q then return q end
  if queue_count >= MAX_QUEUES then queues, queue_count = {}, 0 end
  local prefix = '{' .. list .. '}:'
  q = setmetatable({ list = list }, {
    __index = function(keys, word)
      local key = prefix .. (word == 'stale' and 'ghosts' or word)
      if not word:find(':', 1, true) then rawset(keys, word, key) end
      return key
    end,
  })
  queues[list], queue_count = q, queue_count + 1
  return q
end
