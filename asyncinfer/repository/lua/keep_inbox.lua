#!lua flags=allow-oom
-- keep_inbox: renews the inbox of an API process, and makes it if it is absent.
-- KEYS    1 the inbox
-- ARGV    1 {ttl_seconds}
-- Returns the id of its newest entry, 0-0 if it has none
-- Order   with full memory too: stored jobs run on, and clients wait for them
-- Retry   the second call finds it there

local args = cmsgpack.unpack(ARGV[1])
if redis.call('EXPIRE', KEYS[1], args.ttl_seconds) == 0 then
  redis.call('XADD', KEYS[1], '*', '', 'alive')
  redis.call('EXPIRE', KEYS[1], args.ttl_seconds)
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return newest[1] and newest[1][1] or '0-0'
