-- The strategies: what each one means in the scripts. No other Lua file compares a strategy's name.
-- LoadBalancingStrategy in model.py is the same list in Python, and says how to add a strategy.
--   score     of a ready instance in ready and ready@<label>, see `index` in pool.lua
--     load        relative load, then the last pick    last_pick   the last pick alone
--     free_share  weight * free share of the limit     none        0: membership alone
--   pick      how acquire and select pick a ready instance, see `pick` in pick.lua
--   waiter    which ready instance a waiter is granted, see `best` in maintenance.lua: first or last by score, or any
--   response  how release takes in a response time: mean, a moving average to which each one adds a fifth of the
--             difference; peak, a higher one at once and a lower one as time passes
-- A row is a line of `rules`, and not an entry of a table, which every call would build: 1.4 us for a nested table, 0.9
-- us for one text a row, 0.1 us so (Valkey 9.1). A call of acquire takes some 20 us.
local DEFAULT_STRATEGY = 'least_loaded'

-- Returns the score, pick, waiter and response of a strategy; nil when it is unknown.
local function rules(strategy)
  --                                          score         pick              waiter   response
  if strategy == 'least_loaded'    then return 'load',       'first',          'first', 'mean' end
  if strategy == 'round_robin'     then return 'last_pick',  'first',          'first', 'mean' end
  if strategy == 'weighted'        then return 'free_share', 'proportional',   'last',  'mean' end
  if strategy == 'random'          then return 'none',       'any',            'any',   'mean' end
  if strategy == 'power_of_two'    then return 'load',       'lower_of_two',   'first', 'mean' end
  if strategy == 'peak_ewma'       then return 'none',       'cheaper_of_two', 'any',   'peak' end
  if strategy == 'consistent_hash' then return 'load',       'ring',           'first', 'mean' end
  return nil
end
