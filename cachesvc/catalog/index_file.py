"""The index file as a whole: how long it is, and whether what is mapped is one.

Sizes: 7 rows for 4 slots, so a bucket of 8 holds 4.6 keys at most on average, and SPARE_BUCKETS
for small tables, where a key's two buckets are often one. Both full is then so rare that a block is
refused (and counted) and no row is moved: one or none of a million stored into a full cache.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from kvist.proto.errors import FormatRefused
from kvist.proto.shm import (
    BUCKET_BYTES,
    BUCKET_ROWS,
    CLAIM_BUCKET,
    CLAIM_BUCKETS,
    DEPARTED_BUCKET,
    HEADER_BYTES,
    INDEX_HEADER,
    INDEX_MAGIC,
    ORIGIN_BUCKET,
    ORIGIN_BUCKETS,
    SHM_VERSION,
)

ROWS_PER_4_SLOTS = 7
# 6 KiB. Without them 50 to 85 of a million blocks were refused in arenas of 9 to 100 slots.
SPARE_BUCKETS = 32


def map_index(path: Path) -> mmap.mmap:
    """Map an index that another process has made, read-only.

    Raises: OSError: it cannot be opened. FormatRefused: it is not an index of this version.
    """
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError:
            raise FormatRefused(f"{path} is empty") from None
    problem = _problem(mapped)
    if problem:
        mapped.close()
        raise FormatRefused(f"{path}: {problem}")
    return mapped


def _problem(mapped: mmap.mmap) -> str:
    if len(mapped) < HEADER_BYTES:
        return "shorter than a header"
    magic, version, _, _, buckets, _, _, _, departed, _ = INDEX_HEADER.unpack_from(mapped)
    if magic != INDEX_MAGIC:
        return "not a Kvist index"
    if version != SHM_VERSION:
        return f"version {version}, this program reads {SHM_VERSION}; run one version of Kvist"
    is_power = departed > 0 and departed & (departed - 1) == 0
    if not is_power or not buckets or len(mapped) != file_bytes(buckets, departed):
        return f"{len(mapped)} bytes do not fit {buckets} buckets"
    return ""


def bucket_count(slots: int) -> int:
    """Buckets of an index for that many slots.

    As many as it takes and not the next power of two: each row costs the sidecar 24 bytes here
    and about 50 in its own tables, and there would be up to 4 a slot.
    """
    return -(-slots * ROWS_PER_4_SLOTS // (4 * BUCKET_ROWS)) + SPARE_BUCKETS


def file_bytes(buckets: int, departed: int) -> int:
    """Of an index with that many buckets of rows and of departures."""
    rest = ORIGIN_BUCKETS * ORIGIN_BUCKET.size + CLAIM_BUCKETS * CLAIM_BUCKET.size
    return HEADER_BYTES + buckets * BUCKET_BYTES + departed * DEPARTED_BUCKET.size + rest
