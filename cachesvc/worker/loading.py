"""Loading blocks: find them, wait for them to rise, copy them, and say why one did not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.cachesvc.catalog.location import Location
from kvist.cachesvc.worker.life import Life
from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.keys import BlockKey
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import FLASH_READY
from kvist.proto.slot import SlotReader
from kvist.transfer.device import Target
from kvist.transfer.pace import Pace
from kvist.transfer.pipeline import LayerStream, Lost

# A block rises from flash in 0.5 to 2 ms; a poll costs about 2 us.
POLL_S = 0.0003
# A part of a block that is followed takes 0.15 ms to read.
RISE_POLL_S = 0.0001
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
        deadline: until when to wait for blocks that are rising, in time of CacheClient's now.
    """

    wanted: Sequence[Wanted]
    outs: Sequence[Bytes | Target]
    cuts: Sequence[int]
    reached: Callable[[int], None]
    deadline: float = 0.0


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


def stream_blocks(
    life: Life, load: LayerLoad, pace: Pace, now: Callable[[], float]
) -> tuple[int, str]:
    """See CacheClient.stream; life is entered. What is on flash and does not rise is not waited
    for.

    A sidecar that dies meanwhile is no matter: its memory is mapped until life is left, and what is
    copied from it is verified. What was still rising is given up when the session has ended.
    """

    def patience() -> bool:
        if life.ended or now() >= load.deadline:
            return False
        time.sleep(RISE_POLL_S)
        return True

    readers: list[SlotReader] = []
    lost = ""
    for wanted in load.wanted:
        reader = _open(life, wanted, patience)
        if isinstance(reader, str):
            lost = reader
            break
        readers.append(reader)
    summed = [life.verify.wanted() for _ in readers]
    stream = LayerStream(readers, load.outs[: len(readers)], summed, patience)
    try:
        for layers in stream.copy(load.cuts, pace.before_load):
            load.reached(layers)
        blocks, error = stream.verdict()
    finally:
        stream.settle()
    return blocks, lost if error is None else _reason(life, error, load.wanted[blocks].key)


def _reason(life: Life, error: Lost, key: BlockKey) -> str:
    if isinstance(error, BlockCorrupt):
        return "corrupt"
    if isinstance(error, BlockMissing) and life.ended:
        return "detached"
    if life.index.find(key) is None:  # dropped while it rose, or was copied
        return life.index.miss_reason(key)
    return "flash_late" if isinstance(error, BlockMissing) else "torn"


def _open(life: Life, wanted: Wanted, patience: Callable[[], bool]) -> SlotReader | str:
    """A block in DRAM or on its way there, or why there is none."""
    attempts = 0
    while attempts < LOAD_ATTEMPTS:
        place = life.index.find(wanted.key)
        if place is None:
            return life.index.miss_reason(wanted.key)
        try:
            return _reader(life, place, wanted)
        except BlockCorrupt:
            if life.index.find(wanted.key) == place:
                return "corrupt"
            attempts += 1
        except (BlockMissing, BlockTorn):
            # Of one that rises the header has not come yet, or all of it has.
            if place.dram is None and (place.rising is None or not patience()):
                return "detached" if life.ended else "flash_late"
            attempts += place.dram is not None
    return "torn"


def _reader(life: Life, place: Location, wanted: Wanted) -> SlotReader:
    """Raises: as proto.slot.RisingReader says; BlockMissing: it is on flash only."""
    if place.dram is not None:
        return life.arena.reader(place.dram, wanted)
    if place.rising is not None:
        return life.arena.rising_reader(place.rising, wanted)
    raise BlockMissing("the block is on flash")


def risen(life: Life, key: BlockKey) -> int | None:
    """Bytes of a block's record that can be read now; None of one that is not on its way."""
    place = life.index.find(key)
    if place is None or place.dram == place.rising:  # neither
        return None
    return life.arena.slot_bytes if place.rising is None else life.arena.shown(place.rising)
