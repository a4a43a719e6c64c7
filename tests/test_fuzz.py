"""A few hundred inputs for all that reads bytes of others; `python -m tests.fuzz` runs more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fuzz.target import Check, Target, fuzz
from fuzz.targets import TARGETS
from hypothesis import strategies as st

INPUTS = 300


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_crashes_hangs_or_grows_what_reads_it(name: str) -> None:
    fuzz(TARGETS[name], INPUTS * min(3, TARGETS[name].inputs_an_example))


def test_a_target_that_fails_is_seen() -> None:
    @contextmanager
    def opened() -> Iterator[Check]:
        def check(data: object) -> None:
            assert isinstance(data, bytes)
            assert data[:1] != b"K", "found"

        yield check

    with pytest.raises(AssertionError, match="found"):
        fuzz(Target("known to fail", st.binary(max_size=2), opened), INPUTS)
