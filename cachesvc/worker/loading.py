"""Loading blocks: find them, wait for them to rise, copy them, and say why one did not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.cachesvc.worker.life import Life
from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.keys import BlockKey
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import FLASH_READY
from kvist.proto.slot import SlotReader
from kvist.transfer.device import Target
from kvist.transfer.pace import Pace
from kvist.transfer.pipeline import LayerStream

# A block rises from flash in 0.5 to 2 ms; a poll costs about 2 us.
POLL_S = 0.0003
# A slot may be reused between two looks; twice in a row means that the cache is far too small.
LOAD_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """A load that is wanted layer by layer.

    Attributes:
        wanted: what each block must be.
        outs: where it goes, payload_bytes long; undefined from a miss on.
        cuts: see transfer.pipeline.layer_cuts.
        reached: told how many layers of all blocks have come, or are on their way to a device;
            they are not verified yet.
    """

    wanted: Sequence[Wanted]
    outs: Sequence[Bytes | Target]
    cuts: Sequence[int]
    reached: Callable[[int], None]


def load_block(
    life: Life, wanted: Wanted, out: Bytes | Target, deadline: float, now: Callable[[], float]
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


def stream_blocks(life: Life, load: LayerLoad, pace: Pace) -> tuple[int, str]:
    """See CacheClient.stream; life is entered. What is not in DRAM is not waited for.

    A sidecar that dies meanwhile is no matter: its memory is mapped until life is left, and what is
    copied from it is verified.
    """
    readers: list[SlotReader] = []
    lost = ""
    for wanted in load.wanted:
        reader = _open(life, wanted)
        if isinstance(reader, str):
            lost = reader
            break
        readers.append(reader)
    summed = [life.verify.wanted() for _ in readers]
    stream = LayerStream(readers, load.outs[: len(readers)], summed)
    try:
        for layers in stream.copy(load.cuts, pace.before_load):
            load.reached(layers)
        blocks, error = stream.verdict()
    finally:
        stream.settle()
    if error is None:
        return blocks, lost
    return blocks, "corrupt" if isinstance(error, BlockCorrupt) else "torn"


def _open(life: Life, wanted: Wanted) -> SlotReader | str:
    """A block in DRAM, or why there is none."""
    slot = None
    for _ in range(LOAD_ATTEMPTS):
        slot = life.index.dram_slot(wanted.key)
        if slot is None:
            gone = life.index.find(wanted.key) is None
            return life.index.miss_reason(wanted.key) if gone else "flash_late"
        try:
            return life.arena.reader(slot, wanted)
        except (BlockTorn, BlockMissing):
            continue
        except BlockCorrupt:
            if life.index.dram_slot(wanted.key) == slot:
                return "corrupt"
    return "torn"
