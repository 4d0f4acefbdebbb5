-- The strategies, each as a row of four properties. No other Lua code contains the name of a strategy.
-- LoadBalancingStrategy in model.py is the same list in Python; its docstring says how to add a strategy.
--   score     the score of an instance in the sorted sets ready and ready@<label>, see `index` in pool.lua
--     load        relative load; at equal load, the last pick    last_pick   only the last pick
--     free_share  weight * free share of the limit               none        always 0
--   pick      how acquire and select pick a ready instance, see `pick` in pick.lua
--   waiter    which ready instance a waiter gets, see `best` in maintenance.lua: first or last by score, or any
--   response  how release updates the smoothed response time. mean: a moving average, in which a new response time has
--             a weight of one fifth. peak: a higher response time replaces the old value at once, and a lower response
--             time replaces it gradually
-- Each row is a line of code in `rules`, because a call of `rules` costs only 0.1 us. A table would be created on every
-- call of a script. This would cost 1.4 us with a nested table for each row, and 0.9 us with one text for each row
-- (Valkey 9.1). For comparison, a call of acquire takes some 20 us.
local DEFAULT_STRATEGY = 'least_loaded'

-- Return the score, pick, waiter and response of a strategy; nil for an unknown strategy.
local function rules(strategy)
  --                                          score         pick              waiter   response
  if strategy == 'least_loaded'    then return 'load',       'first',          'first', 'mean' end
  if strategy == 'consistent_hash' then return 'load',       'ring',           'first', 'mean' end
  if strategy == 'round_robin'     then return 'last_pick',  'first',          'first', 'mean' end
  if strategy == 'weighted'        then return 'free_share', 'proportional',   'last',  'mean' end
  if strategy == 'random'          then return 'none',       'any',            'any',   'mean' end
  if strategy == 'power_of_two'    then return 'load',       'lower_of_two',   'first', 'mean' end
  if strategy == 'peak_ewma'       then return 'none',       'cheaper_of_two', 'any',   'peak' end
  return nil
end
