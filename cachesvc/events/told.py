"""What was told to routers: the mirror that makes events of changes, and snapshots of itself.

One value of bytes per block, because the garbage collector does not look at those and a million
of them cost it nothing:

    offset  bytes  field
         0      1  media     bits, see MEDIA
         1     16  parent    key of the block before
        17      4  space     number of its Facts.space, little-endian
        21    4*n  tokens    uint32 each; none when they are not known

With its key and the table's own entry that is 0.4 KB for a block of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvist.cachesvc.events.journal import Changes, Entry, Facts
from kvist.proto.keys import BlockKey
from kvist.proto.kv_events import (
    CPU,
    GPU,
    STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    hash_of,
    parent_hash_of,
)

MEDIA = {GPU: 1, CPU: 2, STORAGE: 4}
# 256 blocks of 64 tokens take 0.4 ms to encode, during which no other thread runs.
EVENT_BLOCKS = 256

_PARENT, _SPACE, _TOKENS = slice(1, 17), slice(17, 21), slice(21, None)


class Told:
    """The media of each block, as a subscriber that heard everything knows them. One thread."""

    def __init__(self) -> None:
        self._blocks: dict[BlockKey, bytes] = {}
        self._spaces: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Blocks in any medium."""
        return len(self._blocks)

    def apply(self, changes: Changes) -> Iterator[list[Event]]:
        """Take changes over; the events that tell them, in lists of about EVENT_BLOCKS blocks.

        A block comes after the one before it, wherever that is told of for the first time. What
        changes nothing is not told.
        """
        events = _Events()
        for entry in list(changes):
            for key, medium in self._with_parents(entry, changes):
                facts = changes.pop((key, medium))
                if facts is not None and (medium or key in self._blocks):
                    self._store(key, MEDIA.get(medium, 0), facts, events)
                elif medium and self._remove(key, medium):
                    events.removed(key, medium)
                if events.blocks >= EVENT_BLOCKS:
                    yield events.take()
        if events.blocks:
            yield events.take()

    def _with_parents(self, entry: Entry, changes: Changes) -> Iterator[Entry]:
        """An entry, and before it those of the blocks before it that nobody has heard of."""
        path: dict[Entry, None] = {}
        while (facts := changes.get(entry)) is not None and entry not in path:
            path[entry] = None
            if facts.parent in self._blocks:
                break
            media = (medium for medium in MEDIA if changes.get((facts.parent, medium)))
            entry = facts.parent, next(media, "")
        if not path and entry in changes:
            path[entry] = None
        yield from reversed(path)

    def _store(self, key: BlockKey, bit: int, facts: Facts, events: _Events) -> None:
        known = self._blocks.get(key)
        media = known[0] if known is not None else 0
        if known is not None and (len(known) > _TOKENS.start or not facts.tokens):
            value = bytes([media | bit]) + known[1:]
            fresh = bit & ~media
        else:  # new, or its tokens are: then all its media are told again
            value, fresh = self._value(media | bit, facts), media | bit
        self._blocks[key] = value
        for each in MEDIA:
            if fresh & MEDIA[each]:
                events.stored(key, each, *self._facts(value))

    def _value(self, media: int, facts: Facts) -> bytes:
        number = self._numbers.setdefault(facts.space, len(self._spaces))
        if number == len(self._spaces):
            self._spaces.append(facts.space)
        return bytes([media]) + facts.parent + number.to_bytes(4, "little") + facts.tokens

    def _facts(self, value: bytes) -> tuple[BlockKey, bytes, str]:
        space = self._spaces[int.from_bytes(value[_SPACE], "little")]
        return BlockKey(value[_PARENT]), value[_TOKENS], space

    def _remove(self, key: BlockKey, medium: str) -> bool:
        value = self._blocks.get(key)
        if value is None or not value[0] & MEDIA[medium]:
            return False
        media = value[0] & ~MEDIA[medium]
        if media:
            self._blocks[key] = bytes([media]) + value[1:]
        else:
            del self._blocks[key]
        return True

    def snapshot(self, batches: int) -> Iterator[list[Event]]:
        """All there is now, whatever changes while it is read, in `batches` lists at most.

        Begins with AllBlocksCleared; parents come before their children.
        """
        return self._all(dict(self._blocks), batches)

    def _all(self, blocks: dict[BlockKey, bytes], batches: int) -> Iterator[list[Event]]:
        room = max(EVENT_BLOCKS, len(MEDIA) * len(blocks) // batches + 1)
        events, done = _Events(), set[BlockKey]()
        events.clear()
        for key in blocks:
            path, above = [], key
            while above in blocks and above not in done:
                path.append(above)
                done.add(above)
                above = BlockKey(blocks[above][_PARENT])
            for each in reversed(path):
                for medium, bit in MEDIA.items():
                    if blocks[each][0] & bit:
                        events.stored(each, medium, *self._facts(blocks[each]))
                if events.blocks >= room:
                    yield events.take()
        if rest := events.take():
            yield rest


class _Events:
    """Events under way; what goes on from the one before becomes one event with it.

    Attributes:
        blocks: in them, each medium counted.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._events: list[Event] = []
        self._open: dict[str, tuple[BlockStored, BlockKey]] = {}

    def take(self) -> list[Event]:
        """All of them; begins anew."""
        events, self._events, self.blocks = self._events, [], 0
        self._open.clear()
        return events

    def clear(self) -> None:
        """AllBlocksCleared."""
        self._events.append(AllBlocksCleared())

    def removed(self, key: BlockKey, medium: str) -> None:
        """A medium lost a block."""
        self.blocks += 1
        self._open.clear()
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(hash_of(key))
        else:
            self._events.append(BlockRemoved([hash_of(key)], medium))

    def stored(
        self, key: BlockKey, medium: str, parent: BlockKey, tokens: bytes, space: str
    ) -> None:
        """A medium got a block; the rest is as in Facts."""
        self.blocks += 1
        extra = (space,) if space else None
        count = len(tokens) // 4
        ids = np.frombuffer(tokens, "<u4").tolist()
        event, end = self._open.get(medium, (None, None))
        if (
            event is not None
            and (end, event.block_size) == (parent, count)
            and (event.extra_keys is None) == (extra is None)
            and ids
        ):
            event.block_hashes.append(hash_of(key))
            event.token_ids += ids
            if event.extra_keys is not None:
                event.extra_keys.append(extra)
        else:
            event = BlockStored(
                [hash_of(key)], parent_hash_of(parent), ids, count, None, medium, None,
                [extra] if extra else None,
            )  # fmt: skip
            self._events.append(event)
        self._open[medium] = event, key
