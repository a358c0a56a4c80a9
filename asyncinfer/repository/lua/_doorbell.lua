-- The doorbell: a list on which idle workers block; each token wakes one of them.

-- Adds a token, which wakes one idle worker; at most 64 are kept. A script is not rolled back, so a
-- key of another type in place of the doorbell must not stop it half way: the token is lost then,
-- and an idle worker looks by itself a moment later.
local function ring_doorbell(q)
  local max_tokens = 64
  local tokens = redis.pcall('LPUSH', q.wake, '1')
  if type(tokens) == 'number' and tokens > max_tokens then
    redis.call('LTRIM', q.wake, 0, max_tokens - 1)
  end
end
