-- What a queue reserves for webhooks: `q.webhooks` has the bytes of each round of a job whose end is
-- to be delivered, until that is delivered or given up; `q.webhookbytes` has the sum.

-- The number of bytes or seconds in a reply; 0 if it is none that a script has written.
local function whole_number(value)
  local number = type(value) == 'string' and tonumber(value) or 0
  return number >= 0 and number <= 2 ^ 40 and number % 1 == 0 and number or 0
end

-- Adds `bytes` (may be negative) to the sum. Makes it anew from the entries if it is corrupt or
-- becomes negative, and deletes it where nothing is reserved.
local function add_webhook_bytes(q, bytes)
  if redis.call('EXISTS', q.webhooks) == 0 then return redis.call('DEL', q.webhookbytes) end
  local sum = redis.pcall('INCRBY', q.webhookbytes, bytes)
  if type(sum) == 'number' and sum >= 0 then return end
  local values = redis.pcall('HVALS', q.webhooks)
  sum = 0
  for i = 1, #values do sum = sum + whole_number(values[i]) end
  redis.call('SET', q.webhookbytes, ('%d'):format(sum))
end
