-- include: fact_names
-- Decoding of packed facts and of the packed ids of a claim.

local FACT_TYPES = {
  [DELIVERIES] = 'number', [SUSPECT] = 'number', [CANCEL_REQUESTED] = 'number', [EXPIRED] = 'number',
  [START_BY_MS] = 'number', [FINISH_BY_MS] = 'number', [TTL_SECONDS] = 'number',
  [CLAIMED_BEFORE] = 'number', [PRIORITY] = 'string', [INBOXES] = 'table', [IDEMPOTENCY_DIGEST] = 'string',
  [WEBHOOK_EVENTS] = 'number', [WEBHOOK_ROUND] = 'number',
  [LOST_DELIVERIES] = 'table',
}

-- Whether the number `value` is valid for the fact `name`: whole, from 0 to 2^53; for a TTL, from
-- 1 s to ten years.
local function is_valid_number(name, value)
  local min, max = 0, 2 ^ 53
  if name == TTL_SECONDS then min, max = 1, 10 * 365 * 24 * 3600 end
  return value >= min and value <= max and value % 1 == 0
end

-- Whether a value is a table of strings, or of facts each of its own type; a fact of an unknown
-- name may be of any type.
local function is_well_formed(value)
  if type(value) ~= 'table' then return false end
  for name, part in pairs(value) do
    local kind = type(part)
    if kind ~= (type(name) == 'number' and 'string' or FACT_TYPES[name] or kind) then return false end
    if kind == 'number' and FACT_TYPES[name] and not is_valid_number(name, part) then return false end
    if (name == INBOXES or name == LOST_DELIVERIES) and not is_well_formed(part) then return false end
  end
  return true
end

-- The table packed in a string: facts by name, or a list of ids. Returns nil if `packed` is false
-- or nil, or corrupt; raises nothing.
local function decode_table(packed)
  if not packed then return nil end
  local ok, value = pcall(cmsgpack.unpack, packed)
  return ok and is_well_formed(value) and value or nil
end
