-- Reads of a single key.

-- The string at a key; false if there is none or the key has another type.
local function value_at(key)
  return redis.call('MGET', key)[1]
end
