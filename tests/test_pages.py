"""Who owns which page, and what the HBM tier keeps."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvist.engine.pages import Pages
from kvist.proto.keys import NO_KEY, BlockKey, block_keys

DIGEST = bytes(32)


def chain(text: bytes) -> list[BlockKey]:
    """Keys of a prompt of one-token blocks."""
    return block_keys(DIGEST, list(text), 1)


def fill(pages: Pages, text: bytes) -> list[int]:
    """Hold the pages of a prompt, found or fresh, all of them registered."""
    keys = chain(text)
    held = pages.lookup(keys)
    pages.hold(held)
    for depth in range(len(held), len(keys)):
        (page,) = pages.allocate(1)
        parent = keys[depth - 1] if depth else NO_KEY
        held.append(pages.register(page, keys[depth], parent, depth))
    return held


def test_a_released_prefix_is_found_again_and_costs_no_page() -> None:
    pages = Pages(8)
    held = fill(pages, b"abc")
    pages.release(held)
    assert pages.lookup(chain(b"abcd")) == held
    assert (pages.used, pages.available, pages.filled) == (0, 8, 3)


def test_the_oldest_prompt_goes_first_and_its_leaves_before_its_root() -> None:
    pages = Pages(4)
    old, new = fill(pages, b"ab"), fill(pages, b"xy")
    pages.release(old)
    pages.release(new)
    pages.allocate(1)
    assert pages.lookup(chain(b"ab")) == old[:1]
    pages.allocate(1)
    assert pages.lookup(chain(b"ab")) == []
    assert pages.lookup(chain(b"xy")) == new


def test_a_shared_prefix_outlives_the_branches() -> None:
    pages = Pages(3)
    left, right = fill(pages, b"ab"), fill(pages, b"ac")
    assert left[0] == right[0]
    pages.release(right)
    pages.release(left)
    pages.allocate(2)
    assert pages.lookup(chain(b"ab")) == left[:1]


def test_a_held_page_is_never_evicted() -> None:
    pages = Pages(2)
    held = fill(pages, b"ab")
    assert pages.available == 0
    with pytest.raises(AssertionError):
        pages.allocate(1)
    pages.check(Counter(held))


def test_the_same_block_completed_twice_is_kept_once() -> None:
    pages = Pages(4)
    (first,), (second,) = pages.allocate(1), pages.allocate(1)
    key = chain(b"a")[0]
    assert pages.register(first, key, NO_KEY, 0) == first
    assert pages.register(second, key, NO_KEY, 0) == first
    pages.check({first: 2})


def test_a_page_that_is_being_copied_stays_when_its_request_leaves() -> None:
    pages = Pages(2)
    held = fill(pages, b"ab")
    pages.pin(held[1:])
    pages.release(held)
    pages.allocate(1)  # evicts the parent, the only idle page
    assert pages.available == 0
    pages.unpin(held[1:])
    assert pages.registered == 0, "nothing could reach it"
    assert pages.available == 1


def test_a_copy_does_not_make_a_page_younger_than_its_parent() -> None:
    pages = Pages(3)
    held = fill(pages, b"abc")
    pages.pin(held[2:])
    pages.release(held)
    pages.unpin(held[2:])
    pages.allocate(1)
    assert pages.lookup(chain(b"abc")) == held[:2]


class PagesAgainstSets(RuleBasedStateMachine):
    """Any order of requests and copies leaves the books as their holders say."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(12)
        self.requests: list[list[int]] = []
        self.copies: list[list[int]] = []

    @rule(text=st.text("ab", min_size=1, max_size=6))
    def start(self, text: str) -> None:
        have = self.pages.lookup(chain(text.encode()))
        missing = len(text) - len(have)
        if missing <= self.pages.available - self.pages.idle(have):
            self.requests.append(fill(self.pages, text.encode()))

    @precondition(lambda self: self.pages.available >= 2)
    @rule()
    def start_private(self) -> None:
        self.requests.append(self.pages.allocate(2))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.requests) - 1))
        self.pages.release(self.requests.pop(index))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.requests))
        self.copies.append(held[data.draw(st.integers(0, len(held) - 1)) :])
        self.pages.pin(self.copies[-1])

    @precondition(lambda self: self.copies)
    @rule()
    def copied(self) -> None:
        self.pages.unpin(self.copies.pop(0))

    @invariant()
    def books_are_right(self) -> None:
        held = [page for one in (*self.requests, *self.copies) for page in one]
        self.pages.check(Counter(held))
        assert self.pages.used == len(set(held))


PagesAgainstSets.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_any_order_of_requests_and_copies_keeps_the_books_right = PagesAgainstSets.TestCase
