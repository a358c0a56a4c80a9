-- The names of webhooks' rounds and deliveries.

-- The name of a round in `q.webhooks`; its delivery is called by this name, `_` and the event.
local function webhook_round(id, round)
  return id .. '_' .. ('%d'):format(round)
end
