"""Load or compute: the cheaper of the two, from rates that are measured and forgotten."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cachesvc.worker.cost import (
    EARLY_MAX,
    START_S,
    TRY_AGAIN,
    Ahead,
    CostModel,
    Prefill,
    Rate,
)
from kvist.proto.shm import NEVER, RATES

BLOCK = 64
BLOCK_BYTES = 1_474_560


def measured(dram: float = 5e9, flash: float = 1e9, token_s: float = 1.5e-3) -> CostModel:
    """A model that has seen these rates."""
    model = CostModel(BLOCK_BYTES, BLOCK)
    for tier, rate in (("dram", dram), ("flash", flash)):
        for _ in range(20):
            model.loaded([tier] * 32, START_S + 32 * BLOCK_BYTES / rate)
    for tokens in (64, 128, 256, 512) * 5:
        model.prefill.observe(tokens, tokens**2 / 2, tokens * token_s)
    return model


def steps(draw: random.Random, count: int, noise: float) -> list[tuple[int, float, float]]:
    """Tokens, positions and seconds of steps of 1.5 ms a token and 0.4 us a token and position."""
    made = []
    for _ in range(count):
        tokens, start = draw.choice((64, 128, 256, 512)), draw.choice((0, 512, 1024, 2048))
        positions = tokens * (start + tokens / 2)
        seconds = tokens * 1.5e-3 + positions * 4e-7
        made.append((tokens, positions, seconds * draw.uniform(1 - noise, 1 + noise)))
    return made


def test_the_first_step_replaces_the_prior() -> None:
    prefill = Prefill()
    prefill.observe(256, 256 * 128, 0.5)
    assert prefill.seconds(256, 256 * 128) == pytest.approx(0.5, rel=0.05)
    assert prefill.seconds(2048, 2048 * 1024) > 2.0


def test_cost_per_token_and_per_position_are_told_apart() -> None:
    prefill = Prefill()
    for step in steps(random.Random(1), 60, 0.1):
        prefill.observe(*step)
    _, a, b = prefill.coefficients
    assert a == pytest.approx(1.5e-3, rel=0.2)
    assert b == pytest.approx(4e-7, rel=0.4)


def test_the_short_ends_of_cached_prompts_tell_what_their_beginnings_would_cost() -> None:
    prefill, c, a, b = Prefill(), 0.03, 1e-3, 2e-7
    cached = 3584
    for number, tokens in enumerate((40, 35, 60)):
        positions = tokens * (cached + tokens / 2)
        seconds = c + a * tokens + b * positions
        prefill.observe(tokens, positions, 5 * seconds if not number else seconds)
        assert not prefill.is_settled
    prefill.observe(1, cached, c + a + b * cached)
    assert prefill.is_settled
    _, a_fit, b_fit = prefill.coefficients
    true_s = a * cached + b * cached**2 / 2
    assert a_fit * cached + b_fit * cached**2 / 2 == pytest.approx(true_s, rel=0.25)


def test_where_nothing_is_decoded_the_cost_of_prompts_is_settled_all_the_same() -> None:
    prefill = Prefill()
    for _ in range(EARLY_MAX):
        assert not prefill.is_settled
        prefill.observe(512, 512 * 256, 0.5)
    assert prefill.is_settled


def test_a_change_of_speed_is_followed() -> None:
    prefill = Prefill()
    for tokens, positions, seconds in steps(random.Random(2), 100, 0.1):
        prefill.observe(tokens, positions, seconds)
    for tokens, positions, seconds in steps(random.Random(3), 100, 0.1):
        prefill.observe(tokens, positions, 3 * seconds)
    assert prefill.seconds(512, 512 * 256) == pytest.approx(3 * (0.768 + 0.0524), rel=0.3)


@settings(max_examples=60, deadline=None)
@given(
    seen=st.lists(
        st.tuples(st.integers(1, 4096), st.integers(0, 1 << 17), st.floats(1e-4, 1e3)),
        max_size=60,
    )
)
def test_whatever_was_measured_no_estimate_is_negative_or_unknown(
    seen: list[tuple[int, int, float]],
) -> None:
    model = measured()
    for tokens, start, seconds in seen:
        model.prefill.observe(tokens, tokens * (start + tokens / 2), seconds)
    choice = model.choose(0, ["dram"] * 5 + ["flash"] * 5, 700, Ahead(3), True)
    assert 0 <= choice.load_s < math.inf
    assert 0 <= choice.compute_s < math.inf
    assert choice.blocks + choice.skipped == 10
    assert set(model.rates_shown()) <= set(RATES)
    assert all(1 <= value <= NEVER for value in model.rates_shown().values())


def test_a_long_step_without_change_of_shape_does_not_drift() -> None:
    prefill = Prefill()
    draw = random.Random(4)
    for _ in range(2000):
        prefill.observe(256, 256 * 128, 0.4 * draw.uniform(0.8, 1.2))
    assert prefill.seconds(256, 256 * 128) == pytest.approx(0.4, rel=0.2)
    assert 2.0 < prefill.seconds(2048, 2048 * 1024) < 20.0


def test_what_is_cheap_to_load_is_loaded_and_what_is_not_is_computed() -> None:
    assert measured().choose(0, ["dram"] * 8, 600, Ahead(), True).blocks == 8
    slow = measured(dram=1e7)  # 147 ms a block against 96 of computing
    choice = slow.choose(0, ["dram"] * 8, 600, Ahead(), True)
    assert choice.blocks < 8
    assert choice.skipped == 8 - choice.blocks


def test_a_flash_tail_that_is_slower_than_computing_is_computed_and_dram_before_it_loaded() -> None:
    model = measured(flash=1e7)
    choice = model.choose(0, ["dram"] * 6 + ["flash"] * 4, 700, Ahead(), True)
    assert (choice.blocks, choice.skipped) == (6, 4)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("followed", [True, False])
def test_until_both_sides_were_measured_everything_is_loaded(alone: bool, followed: bool) -> None:
    model = CostModel(BLOCK_BYTES, BLOCK)
    tiers = ["dram"] * 6 + ["flash"] * 40

    def loads(what: list[str]) -> bool:
        return model.choose(
            0, what, len(what) * BLOCK + 12, Ahead(), alone, followed
        ).blocks == len(what)

    assert loads(tiers)
    assert loads(tiers[:6])
    assert model.rates_shown() == {}
    model.loaded(["dram"] * 6, 2.0)  # a very slow memory, but nobody knows what computing takes
    assert loads(tiers[:6])
    model.prefill.observe(512, 512 * 256, 0.01)
    assert not loads(tiers[:6])
    assert loads(tiers)  # nothing is known of flash yet
    model.loaded(["flash"] * 40, 10.0)
    assert not loads(tiers)


def test_loads_that_are_queued_count() -> None:
    model = measured(dram=1.6e7)  # 92 ms a block against 96
    assert model.choose(0, ["dram"] * 4, 272, Ahead(), True).blocks > 0
    assert model.choose(0, ["dram"] * 4, 272, Ahead(50), True).blocks == 0


def test_a_tier_that_was_slow_is_tried_again() -> None:
    model = measured(flash=1e7)
    loaded = []
    for _ in range(2 * (TRY_AGAIN + 1)):
        choice = model.choose(0, ["flash"] * 4, 272, Ahead(), True)
        model.decided(choice)
        loaded.append(choice.blocks)
    assert loaded.count(4) == 2
    assert loaded[TRY_AGAIN] == 4


def test_the_break_even_length_is_where_loading_and_computing_cost_the_same() -> None:
    model = measured(dram=BLOCK_BYTES / 0.0959)  # a little faster than 96 ms a block
    tokens = model.break_even_tokens("dram")
    rate = model.rates["dram"].bytes_per_s

    def gain(blocks: float) -> float:
        # Without c: a request computes its last tokens either way.
        _, a, b = model.prefill.coefficients
        length = blocks * BLOCK
        return a * length + b * length**2 / 2 - START_S - blocks * BLOCK_BYTES / rate

    assert gain(tokens / BLOCK) >= 0
    assert tokens == BLOCK or gain(tokens / BLOCK - 1) < 0
    assert measured(dram=5e9).break_even_tokens("dram") == BLOCK


def test_where_no_length_pays_the_break_even_is_never() -> None:
    model = CostModel(BLOCK_BYTES, BLOCK)
    model.loaded(["flash"] * 32, 1e4)
    for _ in range(20):  # a token takes no longer for what is before it
        for positions in (0.0, 1e7):
            model.prefill.observe(256, positions, 0.3)
    assert model.break_even_tokens("flash") == math.inf
    assert model.rates_shown()["break_even_tokens.flash"] == NEVER


def test_a_rate_forgets_and_a_short_copy_moves_it_little() -> None:
    rate = Rate(1e9)
    rate.add(1 << 30, 1.0)
    assert rate.bytes_per_s == pytest.approx(1 << 30, rel=0.01)
    before = rate.bytes_per_s
    rate.add(1 << 16, 10.0)
    assert rate.bytes_per_s > 0.9 * before
    for _ in range(20):
        rate.add(1 << 28, 1.0)
    assert rate.bytes_per_s == pytest.approx(1 << 28, rel=0.05)


def test_what_does_not_come_is_slow_and_a_moment_halves_the_rate_at_most() -> None:
    model = measured(flash=1e9)
    model.late(["dram"] * 4 + ["flash"] * 4, 60.0, given_up=False)
    assert model.rates["flash"].bytes_per_s == pytest.approx(0.5e9, rel=0.01)
    model.late(["flash"] * 4, 2.0)
    assert model.rates["flash"].bytes_per_s == pytest.approx(4 * BLOCK_BYTES / 2.0)
    model.late(["flash"] * 4, 1.0)
    assert model.rates["flash"].bytes_per_s == pytest.approx(4 * BLOCK_BYTES / 2.0), "no news"
    model.late(["dram"] * 4, 9.0)
    assert model.rates["dram"].bytes_per_s == measured().rates["dram"].bytes_per_s


def test_what_rises_before_delays_only_what_was_not_asked_for_itself() -> None:
    model = measured()
    tiers = ["dram"] * 2 + ["flash"] * 4

    def loads(ahead: Ahead) -> int:
        return model.choose(0, tiers, 6 * BLOCK + 12, ahead, False, True).blocks

    assert loads(Ahead()) == 6
    assert loads(Ahead(rising_s=100.0)) == 2
    assert loads(Ahead(rising_s=100.0, asked=5)) == 5
    model.rates["flash"].measured = False  # all of it, as far as it can be had
    assert loads(Ahead(rising_s=100.0, asked=5)) == 6
    assert loads(Ahead(rising_s=math.inf, asked=5)) == 5
