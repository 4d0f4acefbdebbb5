-- report_reads: take in what a process has to report of reads it served without a script.
-- KEYS
--   meta        HASH    <tag>:meta
--   size        HASH    <tag>:size
--   exp         ZSET    <tag>:exp
--   new         ZSET    <tag>:new
--   hot         ZSET    <tag>:hot
--   warm        ZSET    <tag>:warm
--   cold        ZSET    <tag>:cold
--   ghost       ZSET    <tag>:ghost
--   trash       LIST    <tag>:trash
-- ARGV
--   writer      text    the process that reports
--   seq         int     rises with each report of that writer
--   misses      int     since the last report
--   saved_ms    int     computing time that hits have saved since, ms
--   corrupt     int     entries found undecodable since
--   reads...    text    key, count of each read, distinct keys, oldest first; the caller bounds them (256)
-- RETURNS
--   {1, now_ms}  taken in, now or by an earlier delivery
--   {0}         the cache has no settings; nothing done
-- REPEAT   a second delivery finds its seq and changes nothing
-- ERRORS   CORRUPT meta is not ours
-- COST     O(reads log N), about ten commands a call
local META, SIZE, EXP, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GHOST, TRASH = KEYS[8], KEYS[9]
local WRITER, SEQ, MISSES = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local SAVED_MS, CORRUPT, READS = tonumber(ARGV[4]), tonumber(ARGV[5]), 6
--@include index
local keys, counts = {}, {}
for i = READS, #ARGV, 2 do keys[#keys + 1] = ARGV[i]; counts[#counts + 1] = tonumber(ARGV[i + 1]) end
I.report(WRITER, SEQ, keys, counts, {MISSES, SAVED_MS, CORRUPT})
if I.writer then
  I.reap(16)
  if I.heaps > 0 then I.empty_trash(16) end
  I.balance()
  I.bury()
  I.save()
end
return {1, I.now_ms}
