-- report_reads: record the reads that a process made without a script.
-- KEYS
--   meta      HASH  <tag>:meta
--   size      HASH  <tag>:size
--   new       ZSET  <tag>:new
--   hot       ZSET  <tag>:hot
--   warm      ZSET  <tag>:warm
--   cold      ZSET  <tag>:cold
--   ghost     ZSET  <tag>:ghost
--   deferred  LIST  <tag>:deferred
--   <tag> is agentperf:{cache:<name>} or agentperf:{tiered:<name>}.
-- ARGV
--   writer    text  the reporting process
--   seq       int   idempotency key of the report, a number that rises with each report of the writer
--   misses    int   misses since the last report
--   saved_ms  int   computing time that hits have saved since the last report, ms
--   corrupt   int   undecodable entries found since the last report
--   reads...  text  for each key that was read: the key, then its number of reads; oldest read first. The caller sends
--                   at most 256 keys
-- RETURNS
--   {1, now_ms}  recorded, now or by an earlier delivery
--   {0}          the cache has no settings, or its entries are being moved to another layout; nothing done
-- REPEAT  a second delivery finds its seq recorded and changes nothing
-- ERRORS  CORRUPT if meta was not written by this library
-- COST    O(reads log N) for N entries; about ten commands record the reads
--@include corrupt
--@include whole_number
--@include index
local META, SIZE, NEW, HOT, WARM, COLD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local GHOST, DEFERRED = KEYS[7], KEYS[8]
local WRITER, SEQ, MISSES = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local SAVED_MS, CORRUPT, READS = tonumber(ARGV[4]), tonumber(ARGV[5]), 6

local I, refusal = open_index(META, SIZE, NEW, HOT, WARM, COLD, GHOST, DEFERRED)
if not I then return refusal end
--@include reads
local keys, counts = {}, {}
for i = READS, #ARGV, 2 do keys[#keys + 1] = ARGV[i]; counts[#counts + 1] = tonumber(ARGV[i + 1]) end
I.report(WRITER, SEQ, keys, counts, {MISSES, SAVED_MS, CORRUPT})
if I.writer then
  if I.next and I.now_ms >= I.next then
--@include expiry
    expire(I)
  end
  if I.deferred_count > 0 then
--@include cleared
    free_cleared(I, 16)
  end
  I.balance()
  I.delete_dropped()
  I.save()
end
return {1, I.now_ms}
