"""Arrays that stay from step to step say what arrays made anew say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.engine.models.base import Chunk
from kvist.engine.models.cpu_rows import DecodeRows, Numbers, fresh_pages, step_rows
from kvist.kernels.cpu.step import Rows

Facts = tuple[object, ...]


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[list[Chunk]]]:
    """Decode steps of requests that come, grow, change pages and go."""
    block_tokens = draw(st.sampled_from([1, 4, 64]))
    made = []
    for _ in range(draw(st.integers(1, 6))):
        chunks = []
        for _ in range(draw(st.integers(1, 5))):
            start = draw(st.integers(0, 5 * block_tokens))
            more = draw(st.integers(0, 2))
            pages = st.integers(0, 9)
            count = start // block_tokens + 1 + more
            chunk_pages = draw(st.lists(pages, min_size=count, max_size=count))
            chunks.append(
                Chunk([draw(st.integers(0, 99))], start, chunk_pages, draw(st.booleans()))
            )
        made.append(chunks)
    return block_tokens, made


def facts(rows: Rows, arrays: Sequence[Numbers]) -> Facts:
    """What a step's arrays say, wherever they say it."""
    tokens, positions, places, block, tables, last = arrays
    count, flat = rows.rows, tables.ravel()
    of = [
        (row, many, flat[at : at + pages].tolist(), place)
        for row, many, at, pages, place in block[: rows.blocks].tolist()
    ]
    assert rows[3:9] == tuple(array.ctypes.data for array in arrays)
    assert all(array.flags.c_contiguous and array.dtype == np.int64 for array in arrays)
    wanted = last[: rows.wanted].tolist()
    return tokens[:count].tolist(), positions[:count].tolist(), places[:count].tolist(), of, wanted


@settings(max_examples=100, deadline=None)
@given(steps())
def test_kept_arrays_say_what_fresh_ones_say(asked: tuple[int, list[list[Chunk]]]) -> None:
    block_tokens, made = asked
    kept = DecodeRows()
    for number, chunks in enumerate(made):
        if number == 3:
            kept.renew()
        rows, arrays, begun = kept.fill(chunks, block_tokens, 7)
        fresh, anew = step_rows(chunks, block_tokens, 7)
        assert facts(rows, arrays) == facts(fresh, anew)
        assert (rows.pool, rows.wanted) == (fresh.pool, fresh.wanted)
        assert begun == fresh_pages(chunks, block_tokens)
