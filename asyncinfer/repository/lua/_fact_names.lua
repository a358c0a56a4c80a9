-- The names of facts: what the scripts must know of a job with options or a history. Redis holds
-- one letter for each. `Facts` in jobs.py lists the same and says what each means.

local DELIVERIES = 'd'
local SUSPECT = 's'
local CANCEL_REQUESTED = 'c'
local EXPIRED = 'e'
local START_BY_MS = 'b'
local FINISH_BY_MS = 'l'
local PRIORITY = 'p'
local TTL_SECONDS = 't'
local INBOXES = 'w'
local CLAIMED_BEFORE = 'r'
local IDEMPOTENCY_DIGEST = 'k'
local WEBHOOK_EVENTS = 'h'
local WEBHOOK_ROUND = 'n'
local LOST_DELIVERIES = 'x'
