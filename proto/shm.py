"""Bytes that a worker and the sidecar share: the index, the arena's slots, a session's ring.

All numbers are little-endian and aligned to their size. Only the sidecar writes the index; only
its worker writes a ring's head, counters and entries, only the sidecar its tail.

Index file: a header of 4096 bytes, then buckets of 192 bytes.

    offset  bytes  header field
         0      8  magic          "KVISTIDX"
         8      4  version        SHM_VERSION
        12      4  flash_state    FLASH_OFF, FLASH_READY, FLASH_REBUILDING, FLASH_FAILED
        16     16  boot_epoch     random id of this life of the sidecar
        32      8  buckets        a power of two
        40      8  slot_bytes     bytes of one DRAM slot
        48      8  dram_slots     slots of the arena
        56      8  heartbeat_ns   CLOCK_MONOTONIC of the sidecar's last sign of life
      1024 16*128  condemned      keys of the last blocks that were lost to damage, zeros where none

    offset  bytes  bucket field
         0    128  8 keys of 16 bytes
       128     64  8 location words: DRAM slot + 1 in the low half, flash slot + 1 in the high
                   half; 0 is a free row

A key lives in one of two buckets, named by its first and its second 8 bytes modulo the number of
buckets. A row never moves while it lives, so there are no chains to walk and no tombstones. The
location word is written last when a row is filled and first when it is freed. A reader that
races with the writer may take a wrong slot number from a row; the record's own header then
differs and the block is a miss.

Ring file: a header of 4096 bytes, then entries of 64 bytes.

    offset  bytes  header field
         0      8  magic          "KVISTRNG"
         8      4  version        SHM_VERSION
        12      4  entries        a power of two
        64      8  head           entries ever written, by the worker
       128      8  tail           entries ever taken, by the sidecar
       512   8*64 counters        running totals, by the worker; the order is COUNTERS

    offset  bytes  entry field
         0      4  kind           TOUCH, PREFETCH or CORRUPT
         4      4  blocks         blocks of the prefix that ends with key
         8     16  key
        24      8  at_ns          CLOCK_MONOTONIC
"""

from __future__ import annotations

import struct

SHM_VERSION = 1
HEADER_BYTES = 4096

INDEX_MAGIC = b"KVISTIDX"
INDEX_HEADER = struct.Struct("<8sII16sQQQQ")
FLASH_STATE_OFFSET = 12
HEARTBEAT_OFFSET = 56
CONDEMNED_OFFSET = 1024
CONDEMNED_KEYS = 128
FLASH_OFF, FLASH_READY, FLASH_REBUILDING, FLASH_FAILED = range(4)

BUCKET_ROWS = 8
BUCKET_KEYS_BYTES = 128
BUCKET_BYTES = 192
LOW_HALF = 0xFFFFFFFF

RING_MAGIC = b"KVISTRNG"
RING_HEADER = struct.Struct("<8sII")
HEAD_OFFSET = 64
TAIL_OFFSET = 128
COUNTERS_OFFSET = 512
ENTRY_BYTES = 64
ENTRY = struct.Struct("<II16sQ")
TOUCH, PREFETCH, CORRUPT = 1, 2, 3

TIERS = ("hbm", "dram", "flash")
"""Where a hit came from: the tier the block was in when the request was looked up."""

MISS_REASONS = (
    "not_stored",  # no tier holds the block: never stored, or evicted
    "tail",  # less than a block, or the last token, which is always computed
    "detached",  # the sidecar is not reachable
    "flash_off",  # the flash tier turned itself off; the block may be there
    "flash_rebuilding",  # the flash index is being rebuilt; the block may be there
    "flash_late",  # the block did not rise from flash in time
    "corrupt",  # checksum, tokens or namespace differed
    "torn",  # the slot was reused while it was read
)
"""Why a token was computed although a cache was asked. requested = sum(hits) + sum(misses)."""

COUNTERS = (
    "lookups",
    "requested_tokens",
    *(f"hit_tokens.{tier}" for tier in TIERS),
    *(f"miss_tokens.{reason}" for reason in MISS_REASONS),
    "loaded_bytes",
    "stored_bytes",
    "ring_drops",
)
"""A worker's running totals, in the order of their words in the ring file."""
