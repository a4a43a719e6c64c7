"""The hottest prefixes: counted by the requests that found them, without repeating themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import Block
from sim.stores import Bench, chain, keys_of

from kvist.cachesvc.study import hottest
from kvist.cachesvc.study.hottest import REST_LOOKS, Prefix


def use(bench: Bench, blocks: Sequence[Block]) -> None:
    """A request finds these."""
    placement = bench.parts.placement
    rows = [placement.index.locate(key) for key in keys_of(blocks)]
    placement.uses.found(np.array(rows, np.int64))


def prefixes(bench: Bench, looks: int = 1) -> tuple[Prefix, ...]:
    """What a whole round finds, after the rest of the one before."""
    for _ in range(REST_LOOKS + looks):
        found = bench.parts.placement.hottest.look()
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path, dram_slots=64)
    made.open()
    return made


def test_what_nobody_has_used_again_is_not_listed(bench: Bench) -> None:
    bench.worker().put(chain(0, 4))
    assert prefixes(bench) == ()
    bench.close()


def test_a_shared_beginning_is_listed_with_its_uses_and_where_it_is(bench: Bench) -> None:
    system = chain(0, 3)
    tails = [chain(10 * at, 2, system[-1]) for at in (1, 2, 3, 4)]
    worker = bench.worker()
    worker.put(system)
    for tail in tails:
        use(bench, system)
        worker.put(tail)
    use(bench, [*system, *tails[0]])
    first, *others = prefixes(bench)
    assert (first.key, first.blocks, first.uses) == (keys_of(system)[-1].hex(), 3, 5)
    assert (first.dram_blocks, first.flash_blocks) == (3, 0)
    assert [(each.blocks, each.uses) for each in others] == [(5, 1)]
    bench.close()


def test_the_turns_of_a_chat_are_one_prefix_and_not_many(bench: Bench) -> None:
    worker, blocks = bench.worker(), chain(0, 12)
    for turn in range(1, 7):
        worker.put(blocks[2 * turn - 2 : 2 * turn])
        use(bench, blocks[: 2 * turn])
    # Of its turns, used 6, 5, 4, 3, 2 times and once, only those that differ by a factor of two.
    found = prefixes(bench)
    assert [(each.blocks, each.uses) for each in found] == [(6, 4), (10, 2), (12, 1)]
    bench.close()


def test_a_long_document_does_not_crowd_out_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hottest, "_BEST", 4)
    worker, document, short = bench.worker(), chain(0, 40), chain(100, 2)
    worker.put(document)
    worker.put(short)
    for used in (document, document, short):
        use(bench, used)
    assert [(each.blocks, each.uses) for each in prefixes(bench)] == [(40, 2), (2, 1)]
    bench.close()


def test_a_count_stays_at_its_largest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hottest, "USES_MAX", 5)
    blocks = chain(0, 2)
    bench.worker().put(blocks)
    for _ in range(9):
        use(bench, blocks)
    assert [each.uses for each in prefixes(bench)] == [5]
    bench.close()


def test_a_block_that_went_takes_its_uses_along(bench: Bench) -> None:
    worker, blocks = bench.worker(), chain(0, 3)
    worker.put(blocks)
    use(bench, blocks)
    assert len(prefixes(bench)) == 1
    bench.store.clear(None)
    assert prefixes(bench) == ()
    worker.put(blocks)
    assert prefixes(bench) == ()
    bench.close()


def test_a_large_table_is_gone_over_slice_by_slice_with_the_same_result(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bench.worker()
    draw = np.random.default_rng(5)
    for at in range(8):
        blocks = chain(100 * at, 5)
        worker.put(blocks)
        for _ in range(int(draw.integers(1, 9))):
            use(bench, blocks)
    whole = prefixes(bench)
    monkeypatch.setattr(hottest, "_SLICE_ROWS", 16)
    rows = bench.parts.placement.index.rows
    assert len(whole) == 8
    assert sorted(whole, key=str) == sorted(prefixes(bench, -(-rows // 16)), key=str)
    worth = [each.uses * each.blocks for each in whole]
    assert worth == sorted(worth, reverse=True)
    bench.close()
