-- The doorbell: a list on which idle workers block; each token wakes one of them.

local MAX_DOORBELL_TOKENS = 64

-- A script is not rolled back, so a key of another type in place of the doorbell must not stop it
-- half way: the token is lost then, and an idle worker looks by itself a moment later.
local function ring_doorbell(q)
  local tokens = redis.pcall('LPUSH', q.wake, '1')
  if type(tokens) == 'number' and tokens > MAX_DOORBELL_TOKENS then
    redis.call('LTRIM', q.wake, 0, MAX_DOORBELL_TOKENS - 1)
  end
end
