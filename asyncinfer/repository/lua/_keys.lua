-- The names of a queue's keys: `queue(Q).running` is `{Q}:running`, and `.list` is Q itself, the
-- list of jobs of normal priority.
-- Words   high low wake running leases facts deadlines delayed seq bytes kept keptbytes stale
--         paused dead log logmarks control reapgate swept hold; in brackets 'claim:' .. token,
--         'idem:' .. digest
-- Each word is the key's own name, except `stale`: its key is `ghosts` in every release.

-- The `q` that functions take: a table with the names of the keys of the queue `list`. Reads
-- nothing; a name is built when it is first used, from any word.
local function queue(list)
  local prefix = '{' .. list .. '}:'
  return setmetatable({ list = list }, {
    __index = function(keys, word)
      local key = prefix .. (word == 'stale' and 'ghosts' or word)
      rawset(keys, word, key)
      return key
    end,
  })
end
