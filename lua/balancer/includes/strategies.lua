-- The strategies, each as a row of four properties. No other Lua code contains the name of a strategy.
-- LoadBalancingStrategy in model.py is the same list in Python; its docstring says how to add a strategy.
--   score     the score of an instance in the sorted sets ready and ready@<label>, see `index` in pool.lua
--     load        relative load, then the number of the last pick
--     last_pick   number of the last pick
--     free_share  weight * free share of the limit
--     none        always 0
--   pick      how acquire and select pick a ready instance, see `pick` in pick.lua
--   waiter    which ready instance a waiter gets, see `best` in maintenance.lua: first or last by score, or any
--   response  how release updates the smoothed response time. mean: a moving average, in which a new response time has
--             a weight of one fifth. peak: a higher response time replaces the old value at once, and a lower response
--             time replaces it gradually
-- The rows are code, not a table, because a call of `rules` costs only 0.1 us. A table would be created on every call
-- of a script. Its creation would cost 1.4 us with a nested table for each row, and 0.9 us with one text for each row
-- (Valkey 9.1). For comparison, a call of acquire takes some 20 us. Each `if` in `rules` compares its whole argument,
-- which is POOL and the name. Cutting the name out of this text would cost another 0.2 us.
local POOL, DEFAULT_STRATEGY = 'schema=2 strategy=', 'least_loaded'
local MAX_WEIGHT = 1e6  -- as in model.py

-- Return the score, pick, waiter and response of a strategy, and its name. The argument is POOL followed by the name.
-- Returns nil for any other text.
local function rules(pool)
  --       score         pick              waiter   response  name
  if pool == 'schema=2 strategy=least_loaded' then
    return 'load',       'first',          'first', 'mean',  'least_loaded'
  elseif pool == 'schema=2 strategy=consistent_hash' then
    return 'load',       'ring',           'first', 'mean',  'consistent_hash'
  elseif pool == 'schema=2 strategy=round_robin' then
    return 'last_pick',  'first',          'first', 'mean',  'round_robin'
  elseif pool == 'schema=2 strategy=weighted' then
    return 'free_share', 'proportional',   'last',  'mean',  'weighted'
  elseif pool == 'schema=2 strategy=random' then
    return 'none',       'any',            'any',   'mean',  'random'
  elseif pool == 'schema=2 strategy=power_of_two' then
    return 'load',       'lower_of_two',   'first', 'mean',  'power_of_two'
  elseif pool == 'schema=2 strategy=peak_ewma' then
    return 'none',       'cheaper_of_two', 'any',   'peak',  'peak_ewma'
  end
  return nil
end
