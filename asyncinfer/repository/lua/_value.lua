-- Reads of a single key.

-- The string at a key, a number as its digits too; false if there is none or the key has another
-- type. Raises nothing.
local function value_at(key)
  return redis.call('MGET', key)[1]
end
