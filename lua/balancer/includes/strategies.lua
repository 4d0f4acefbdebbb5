-- The strategies: what each one means in the scripts. No other Lua file compares a strategy's name.
-- LoadBalancingStrategy in model.py is the same list in Python, and says how to add a strategy.
--   score     of a ready instance in ready and ready@<label>, see `index` in pool.lua
--     load        relative load, then the last pick    last_pick   the last pick alone
--     free_share  weight * free share of the limit     none        0: membership alone
--   pick      how acquire and select pick a ready instance, see `pick` in pick.lua
--   waiter    which ready instance a waiter is granted, see `best` in maintenance.lua: the first or last by score, or any
--   response  how release takes in a response time: mean, a moving average to which each one adds a fifth of the
--             difference; peak, a higher one at once and a lower one as time passes
-- A row is one text: seven nested tables would cost every call 1.4 us, seven texts cost 0.6 us (Valkey 9.1).
local STRATEGIES = {
  --                 score       pick           waiter  response
  round_robin     = 'last_pick   first          first   mean',
  least_loaded    = 'load        first          first   mean',
  weighted        = 'free_share  proportional   last    mean',
  random          = 'none        any            any     mean',
  power_of_two    = 'load        lower_of_two   first   mean',
  peak_ewma       = 'none        cheaper_of_two any     peak',
  consistent_hash = 'load        ring           first   mean',
}
local DEFAULT_STRATEGY = 'least_loaded'

-- Returns the score, pick, waiter and response of a strategy; those of the default one for nil.
local function rules(strategy)
  return string.match(STRATEGIES[strategy or DEFAULT_STRATEGY], '^(%S+) +(%S+) +(%S+) +(%S+)$')
end
