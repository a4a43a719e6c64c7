"""Every error Kvist raises on purpose.

KvistError
├── BlockMissing      the block is not there; recompute it
├── BlockCorrupt      bytes, tokens or namespace are not what was asked; recompute, drop the copy
├── BlockTorn         the slot changed while it was read; look up again or recompute
├── TierFull          no slot is free and nothing may be evicted; skip the store
├── TierOffline       the tier's device failed and the tier turned itself off; treat as a miss
├── FormatRefused     bytes on disk or in shared memory are of another format version; clear them
├── Detached          the sidecar is not reachable now; treat as a miss, the client re-attaches
├── SessionUnknown    the sidecar does not know the session (it restarted); attach again
└── ConfigInvalid     a setting is wrong; the message names the key and the fix
    └── FolderInUse   another process has the folder; a cache that must not fail goes without

A cache never fails a request: each of these but the last has a cheap answer, named above. A
broken invariant is not in this tree. It is an AssertionError and ends the process.
"""

from __future__ import annotations


class KvistError(Exception):
    """The root of the tree above."""


class BlockMissing(KvistError):
    """The block is not there; recompute it."""


class BlockCorrupt(KvistError):
    """Bytes, tokens or namespace differ from what was asked; recompute it, drop the copy."""


class BlockTorn(KvistError):
    """The slot's generation changed while it was read; look up again or recompute."""


class TierFull(KvistError):
    """No slot is free and nothing may be evicted; skip the store."""


class TierOffline(KvistError):
    """The tier's device failed and the tier turned itself off; treat as a miss."""


class FormatRefused(KvistError):
    """Bytes on disk or in shared memory are of a format this version cannot read; clear them."""


class Detached(KvistError):
    """The sidecar is not reachable now; treat as a miss, the client attaches again by itself."""


class SessionUnknown(KvistError):
    """The sidecar does not know the session, most likely because it restarted; attach again."""


class ConfigInvalid(KvistError):
    """A setting is wrong; the message names the key and the fix."""


class FolderInUse(ConfigInvalid):
    """Another process has the flash folder; the message says which, and what to do.

    Attributes:
        pid: its id in words, "?" where it has left none.
    """

    def __init__(self, message: str, pid: str) -> None:
        super().__init__(message)
        self.pid = pid
