-- The length of a packed list.

-- Returns how many ids are packed in a field, by its first bytes: 0 if it is no packed list of up
-- to 65,535.
local function packed_length(packed)
  local first, second, third = packed:byte(1, 3)
  if first == 0xdc and third then return second * 256 + third end
  return first and first >= 0x90 and first <= 0x9f and first - 0x90 or 0
end
