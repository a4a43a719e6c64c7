"""Loading one block: find it, wait for it to rise, copy it, and say why it did not come."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvist.cachesvc.life import Life
from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.keys import BlockKey
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import FLASH_READY

# A block rises from flash in 0.5 to 2 ms; a poll costs about 2 us.
POLL_S = 0.0003
# A slot may be reused between two looks; twice in a row means that the cache is far too small.
LOAD_ATTEMPTS = 3


def load_block(
    life: Life, wanted: Wanted, out: Bytes, deadline: float, now: Callable[[], float]
) -> str | None:
    """See CacheClient.load; life is entered."""
    attempts = 0
    while not life.ended:
        slot = life.index.dram_slot(wanted.key)
        if slot is None:
            reason = _wait(life, wanted.key, deadline > now(), attempts)
            if reason:
                return reason
            continue
        try:
            life.arena.read(slot, wanted, out, life.verify.wanted())
            return None
        except (BlockTorn, BlockMissing):
            pass
        except BlockCorrupt:
            # A slot that was given to another block since the look at the index is no fault.
            if life.index.dram_slot(wanted.key) == slot:
                return "corrupt"
        attempts += 1
        if attempts == LOAD_ATTEMPTS:
            return "torn"
    return "detached"


def _wait(life: Life, key: BlockKey, has_time: bool, attempts: int) -> str:
    """A moment for a block to rise; why it does not, or "" when it may have."""
    location = life.index.find(key)
    if location is None:
        return "torn" if attempts else life.index.miss_reason(key)
    if location.dram is None:
        if life.index.flash_state != FLASH_READY:
            return life.index.miss_reason(key)
        if not has_time:
            return "flash_late"
        time.sleep(POLL_S)
    return ""
