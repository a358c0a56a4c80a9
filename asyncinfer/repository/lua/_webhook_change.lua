-- include: webhook_parse
-- Deliveries whose state a caller has read and changes.

-- Finds a delivery whose state is the one that the caller has read (`expected`), or already its new
-- one (`state`), as after a repeated call. Returns {id, field, round, key}: of its job, the field in
-- the hash at `key`, and the name of its round; else nil and the verdict: absent, or {changed, the
-- state that Redis has}.
local function delivery_to_change(q, member, expected, state)
  local id, field, round = parse_delivery(member)
  if not id then return nil, 'absent' end
  local key = q['webhook:' .. id]
  local target, current = unpack(redis.call('HMGET', key, 'target', field))
  if not target or not current then return nil, 'absent' end
  if current ~= expected and current ~= state then return nil, { 'changed', current } end
  return { id = id, field = field, round = round, key = key }
end
