"""Bytes that a worker and the sidecar share: the index, the arena's slots, a session's ring.

All numbers are little-endian and aligned to their size. Only the sidecar writes the index; only
its worker writes a ring's head, counters and entries, only the sidecar its tail.

Index file: a header of 4096 bytes, then buckets of 192 bytes, then the departed buckets of 64
bytes, then the origin buckets of 64 bytes, then the claim buckets of 128 bytes.

    offset  bytes  header field
         0      8  magic          "KVISTIDX"
         8      4  version        SHM_VERSION
        12      4  flash_state    FLASH_OFF, FLASH_READY, FLASH_REBUILDING, FLASH_FAILED or
                                  FLASH_UNREAD
        16     16  boot_epoch     random id of this life of the sidecar
        32      8  buckets        >= 1
        40      8  slot_bytes     bytes of one DRAM slot
        48      8  dram_slots     slots of the arena
        56      8  heartbeat_ns   CLOCK_MONOTONIC of the sidecar's last sign of life
        64      8  departed       departed buckets, a power of two
        72      8  sessions       workers attached
        80      4  dram_verify    position in proto.verify.VERIFY

    offset  bytes  bucket field
         0    128  8 keys of 16 bytes
       128     64  8 location words: DRAM slot + 1 in the low half, flash slot + 1 in the high
                   half; 0 is a free row. With RISING in the low half the block is on its way from
                   flash into that slot: it is not in DRAM yet, but see proto/slot.RisingReader

A key lives in one of two buckets, named by its first and its second 8 bytes modulo the number of
buckets. A row never moves while it lives, so there are no chains to walk and no tombstones. The
location word is written last when a row is filled and first when it is freed. A reader that
races with the writer may take a wrong slot number from a row; the record's own header then
differs and the block is a miss.

A departed bucket is 16 words of 4 bytes, the latest first, 0 where none: why a block that is in no
tier any more went. A key's bucket is its first 8 bytes modulo their number; a word is the low 27
bits of its second 8 bytes, shifted left by 5, and the reason, an index into DEPARTURES. A reader
takes a key that never was there for one of them with a probability of 16 / 2**27, 1.2e-7.

An origin bucket is 4 pairs of 8 bytes, the latest first: the origin of a first block (proto/keys),
which names its tokens and its tenant but not its namespace, and the first 8 bytes of the digest of
the namespace that it was stored in. The bucket is the origin modulo ORIGIN_BUCKETS.

A claim bucket is 4 entries of 32 bytes: a key that some worker is computing now (16 bytes), the
number of its session (8, AttachReply.number; 0 is a free entry), zeros (8). The bucket is the key's
first 8 bytes modulo CLAIM_BUCKETS. The number is written last when an entry is filled and first
when it is freed.

Ring file: a header of 4096 bytes, then 64 tenant rows of 512 bytes, then entries of 64 bytes.

    offset  bytes  header field
         0      8  magic          "KVISTRNG"
         8      4  version        SHM_VERSION
        12      4  entries        a power of two
        64      8  head           entries ever written, by the worker
       128      8  tail           entries ever taken, by the sidecar
       512  8*192 counters        running totals, by the worker; the order is COUNTERS
      2048   8*16 rates           what it measured last, by the worker; the order is RATES; 0 is
                                  not measured

    offset  bytes  tenant row field
         0      8  name_bytes     bytes of the name + 1, written after it; 0 is a free row
         8    128  name           of the tenant, UTF-8, see proto/keys.py; none is the common pool
       136   8*47 counters        running totals of its requests; the order is TENANT_COUNTERS

Row 0 is of all tenants that have no row of their own, and has no name. A row never gets another
name, so that its totals only grow.

    offset  bytes  entry field
         0      4  kind           TOUCH, PREFETCH, CORRUPT, CLAIM, RELEASE, EXPECT or FOLLOW
         4      4  blocks         blocks of the prefix that ends with key
         8     16  key
        24      8  at_ns          CLOCK_MONOTONIC
        32      4  pause_ms       of a hint, see proto/hints.py; 0 without one, as the next two
        36      1  priority       with a sign
        37      1  session_end    0 or 1
"""

from __future__ import annotations

import struct

from kvist.proto.histograms import WORKER_HISTOGRAMS, words_of

SHM_VERSION = 7
HEADER_BYTES = 4096

INDEX_MAGIC = b"KVISTIDX"
INDEX_HEADER = struct.Struct("<8sII16sQQQQQQ")
FLASH_STATE_OFFSET = 12
HEARTBEAT_OFFSET = 56
SESSIONS_OFFSET = 72
VERIFY_OFFSET = 80
FLASH_OFF, FLASH_READY, FLASH_REBUILDING, FLASH_FAILED, FLASH_UNREAD = range(5)
"""FLASH_FAILED: what is there is in the index. FLASH_UNREAD: the folder is not open, and what is in
it is known to nobody."""

BUCKET_ROWS = 8
BUCKET_KEYS_BYTES = 128
BUCKET_BYTES = 192
LOW_HALF = 0xFFFFFFFF
RISING = 0x80000000

DEPARTED_BUCKET = struct.Struct("<16I")
DEPARTED_TAG_BITS = 27
DEPARTED_REASON_BITS = 5
ORIGIN_BUCKET = struct.Struct("<8Q")
ORIGIN_BUCKETS = 1024
CLAIM_BUCKET = struct.Struct("<" + 4 * "16sQ8x")
CLAIM_ENTRY_BYTES = 32
CLAIM_BUCKETS = 512

RING_MAGIC = b"KVISTRNG"
RING_HEADER = struct.Struct("<8sII")
HEAD_OFFSET = 64
TAIL_OFFSET = 128
COUNTERS_OFFSET = 512
RATES_OFFSET = 2048
TENANTS_OFFSET = HEADER_BYTES
TENANT_ROWS = 64
TENANT_ROW_BYTES = 512
TENANT_NAME_OFFSET = 8
TENANT_NAME_BYTES = 128
TENANT_COUNTERS_OFFSET = 136
ENTRIES_OFFSET = TENANTS_OFFSET + TENANT_ROWS * TENANT_ROW_BYTES
ENTRY_BYTES = 64
ENTRY = struct.Struct("<II16sQIbB")
TOUCH, PREFETCH, CORRUPT, CLAIM, RELEASE, EXPECT, FOLLOW = range(1, 8)
"""FOLLOW is a PREFETCH of one who reads the blocks while they rise: all of them part by part."""

TIERS = ("hbm", "dram", "flash")
"""Where a hit came from: the tier the block was in when the request was looked up."""

DEPARTURES = (
    "",  # it is not known that the block ever was there
    "evicted",  # dropped to make room for others
    "not_admitted",  # a tier did not take it: no room, first use, write budget
    "expired",  # its tenant's TTL was over
    "cleared",  # dropped by Clear
    "corrupt",  # checksum, tokens or namespace differed, of this block or of one before it
)
"""Why a block is in no tier any more; the order is the number in the index file."""

MISS_REASONS = (
    "never_stored",  # no tier holds the block, and none is known to have had it
    *DEPARTURES[1:],
    "namespace",  # the same first block is stored, but under another namespace of the tenant
    "tail",  # less than a block, or the last token, which is always computed
    "no_cache",  # the engine has no cache beyond its own pool
    "detached",  # the sidecar is not reachable
    "self_test",  # what the worker stored for a trial did not come back: it runs without the cache
    "flash_off",  # the flash tier turned itself off; the block may be there
    "flash_rebuilding",  # the flash index is being rebuilt; the block may be there
    "flash_late",  # the block did not rise from flash in time
    "flight_late",  # another worker was computing the block, and it did not come in time
    "torn",  # the slot was reused while it was read
    "cheaper",  # the block is there, but to load it would have taken longer than to compute it
)
"""Why a token was computed although a cache was asked. requested = sum(hits) + sum(misses)."""

STORABLE = frozenset(("never_stored", "namespace", *DEPARTURES[1:]))
"""Reasons which say that the block is in no tier, so that to store it now is worth while."""

MOVED_TIERS = TIERS[1:]
"""Tiers whose blocks are copied before they are used; those of HBM lie where they are used."""

TENANT_COUNTERS = (
    "lookups",
    *(f"hit_tokens.{tier}" for tier in TIERS),
    *(f"miss_tokens.{reason}" for reason in MISS_REASONS),
    *(f"saved_us.{tier}" for tier in TIERS),  # it would have taken to compute the hits
    *(f"load_us.{tier}" for tier in MOVED_TIERS),  # it took to bring them in
    *(f"load_bytes.{tier}" for tier in MOVED_TIERS),
    "store_us",  # it took to copy blocks out
    "stored_blocks",
)
"""A worker's running totals of one tenant, in the order of the words of its row. Every lookup is in
one row, so the sum over the rows is the whole; tokens asked for are the sum of hits and misses."""

COUNTERS = (
    "loaded_bytes",
    "stored_bytes",
    "ring_drops",
    "flights_got",
    "flights_lost",
    "flight_tokens",
    "decisions.load",  # all that was found
    "decisions.part",
    "decisions.compute",  # although it was there
    "failed_reads.corrupt",
    "failed_reads.torn",
    *(word for name in WORKER_HISTOGRAMS for word in words_of(name)),
)
"""A worker's other running totals, in the order of their words in the ring file."""

RATES = (
    "load_bytes_per_s.dram",
    "load_bytes_per_s.flash",
    "store_bytes_per_s.dram",
    "prefill_tokens_per_s.512",  # of a prompt of so many tokens
    "prefill_tokens_per_s.2048",
    "prefill_tokens_per_s.8192",
    "break_even_tokens.dram",  # a prefix of so many tokens is loaded faster than computed
    "break_even_tokens.flash",
    "pool_blocks.total",  # of the engine's own pool, the HBM tier
    "pool_blocks.filled",  # held by requests, or kept to be found again
)
"""What a worker measured, whole numbers, in the order of their words in the ring file."""

NEVER = (1 << 64) - 1
"""As a number of tokens: no length does."""
