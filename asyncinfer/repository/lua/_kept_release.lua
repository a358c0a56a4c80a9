-- include: job_keys stored_bytes kept
-- What an ended job keeps is given back when it is deleted or runs again.

-- Takes off the bytes that an ended job keeps; call it while its keys and their TTL are there. A
-- job whose end was not counted (an older release or another program ended it) takes off no more
-- than is counted in its minute, so that no count becomes negative.
local function give_back_kept_bytes(q, id)
  local bytes = 0
  for _, word in ipairs({ 'data', 'result', 'error' }) do bytes = bytes + stored_bytes(id, word) end
  if bytes < MIN_KEPT_BYTES then return end
  local expires_ms = redis.call('PEXPIRETIME', job_key(id, 'status'))
  local count = redis.pcall('HGET', q.kept, math.floor(expires_ms / 60000))
  bytes = math.min(bytes, tonumber(type(count) == 'string' and count) or 0)
  if bytes > 0 then add_kept_bytes(q, expires_ms, -bytes) end
end
