-- Groups: how long the list of their jobs is kept, and what is known of a closed one.

local GROUP_SECONDS = 7 * 24 * 3600

-- Keeps a group for a week from now; `...` are its keys, those that are there.
local function keep_group(...)
  for _, key in ipairs({ ... }) do redis.call('EXPIRE', key, GROUP_SECONDS) end
end
