"""What the core notes of one traced request; engine/tracing says which spans there are."""

from __future__ import annotations

from collections.abc import Sequence as Blocks
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvist.cachesvc.worker.cost import decision_of
from kvist.proto.trace import Attribute, SpanNote, TraceContext

if TYPE_CHECKING:  # a sequence has a trace
    from kvist.engine.copying import Loaded
    from kvist.engine.sequence import Sequence
    from kvist.engine.tally import Lookup


@dataclass(slots=True)
class _Part:
    """Something that took time inside a larger part."""

    name: str
    start_s: float
    end_s: float
    attributes: dict[str, Attribute]


class SequenceTrace:
    """Stamps and findings of one sequence. The core's thread.

    Attributes:
        store: place of its one span of stores, for who calls the sidecar.
        asked_s: when the load under way was asked for.

    Args:
        at: place of the answer's span, of which everything here is a part.
        submitted_s: when the API process sent it.
    """

    def __init__(self, at: TraceContext, submitted_s: float) -> None:
        self.store = at.child()
        self.asked_s = 0.0
        self._at = at
        self._submitted_s = submitted_s
        self._loads: list[_Part] = []
        self._lookup: _Part | None = None
        self._rise: _Part | None = None
        self._stores: _Part | None = None
        self._storing = 0
        self._counted = self._ended = False

    def looked(self, sequence: Sequence, start_s: float, end_s: float) -> None:
        """Its prefix was looked up; the last time before it is admitted counts."""
        if self._counted:  # it has lost its pages and looks again
            return
        attributes: dict[str, Attribute] = {"kvist.found_blocks": len(sequence.found)}
        if sequence.choice is not None:
            attributes |= _estimate(sequence)
        self._lookup = _Part("kvist.lookup", start_s, end_s, attributes)

    def counted(self, lookup: Lookup) -> None:
        """Every token of its prompt is a hit or a miss now."""
        self._counted = True
        if self._lookup is not None:
            attributes = self._lookup.attributes
            attributes["kvist.requested_tokens"] = lookup.requested
            attributes |= {f"kvist.hit_tokens.{tier}": n for tier, n in lookup.hits.items()}
            attributes |= {f"kvist.miss_tokens.{why}": n for why, n in lookup.misses.items()}

    def rises(self, start_s: float, blocks: int) -> None:
        """Its blocks begin to rise from flash."""
        self._rise = _Part("kvist.rise", start_s, start_s, {"kvist.blocks": blocks})

    def rose(self, end_s: float, is_late: bool) -> None:
        """They are in DRAM, or it waits for them no more."""
        if self._rise is not None:
            self._rise.end_s = end_s
            self._rise.attributes["kvist.late"] = is_late

    def loaded(self, loaded: Loaded) -> None:
        """A load has ended."""
        sequence = loaded.sequence
        tiers = [
            "flash" if block in sequence.rose else tier
            for block, tier in enumerate(sequence.found, sequence.registered)
        ]
        attributes: dict[str, Attribute] = {
            f"kvist.blocks.{tier}": tiers.count(tier) for tier in sorted(set(tiers))
        }
        attributes["kvist.beside_computation"] = loaded.gate is not None
        if loaded.reason:
            attributes["kvist.miss_reason"] = loaded.reason
        if sequence.choice is not None:
            attributes |= _estimate(sequence)
        if sequence.cost is not None:
            attributes["kvist.load_s"] = sequence.cost.load_s
        end_s = self.asked_s + loaded.seconds
        self._loads.append(_Part("kvist.load", self.asked_s, end_s, attributes))

    def stores(self) -> None:
        """A block of it was queued to be stored."""
        self._storing += 1

    def stored(self, start_s: float, seconds: float, blocks: int) -> list[SpanNote]:
        """Blocks of it were stored or dropped; the note, once it was the last of an ended one."""
        end_s = start_s + seconds
        self._storing -= blocks
        if self._stores is None:
            self._stores = _Part("kvist.store", start_s, end_s, {"kvist.blocks": 0})
        self._stores.end_s = end_s
        before = self._stores.attributes["kvist.blocks"]
        assert isinstance(before, int)
        self._stores.attributes["kvist.blocks"] = before + blocks
        return self._store_note() if self._ended else []

    def _store_note(self) -> list[SpanNote]:
        if self._storing or self._stores is None:
            return []
        part, self._stores = self._stores, None
        return [_note(part, self.store, self._at.span)]

    def end(self, sequence: Sequence, end_s: float) -> list[SpanNote]:
        """It has ended: the notes of all that is known."""
        self._ended = True
        step_s, token_s = sequence.scheduled_s, sequence.first_token_s
        ready_s = end_s if step_s is None else step_s
        chain = [_Part("kvist.queue", self._submitted_s, ready_s, {})]
        first = self._loads[0] if self._loads else None
        if first is not None and first.end_s <= ready_s:  # before its first step, not beside it
            chain[0].end_s, ready_s = first.start_s, first.end_s
            chain.append(self._loads.pop(0))
        if step_s is not None:
            chain.append(_Part("kvist.prefill", ready_s, token_s or end_s, {}))
        if token_s is not None:
            preempted: dict[str, Attribute] = {"kvist.preempted": sequence.preempted}
            chain.append(_Part("kvist.decode", token_s, end_s, preempted))
        return [*self._notes(chain), *self._store_note()]

    def _notes(self, chain: Blocks[_Part]) -> list[SpanNote]:
        """The chain, and in each link what happened meanwhile."""
        inner = [one for one in (self._lookup, self._rise, *self._loads) if one is not None]
        notes = []
        for link in chain:
            place = self._at.child()
            notes.append(_note(link, place, self._at.span))
            for part in [one for one in inner if one.end_s <= link.end_s or link is chain[-1]]:
                inner.remove(part)
                notes.append(_note(part, place.child(), place.span))
        return notes


def _note(part: _Part, at: TraceContext, parent: str) -> SpanNote:
    return SpanNote(part.name, at, parent, part.start_s, part.end_s, part.attributes)


def _estimate(sequence: Sequence) -> dict[str, Attribute]:
    """What was decided, and on what ground."""
    choice = sequence.choice
    assert choice is not None
    return {
        "kvist.decision": decision_of(choice),
        "kvist.estimate.load_s": choice.load_s,
        "kvist.estimate.compute_s": choice.compute_s,
        "kvist.skipped_blocks": choice.skipped,
    }
