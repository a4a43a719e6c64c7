"""The sampler: filters against transformers', draws that are alone in any batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvist.engine.request import SamplingParams
from kvist.engine.sampler import CDF_BLOCK, DrawState, Sampler, draw

SMALL_VOCAB = 40
GOLDEN = [0.15214, 0.424438, 0.030983]


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**values)


def logits_of(rows: int, vocab: int = SMALL_VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: torch.Tensor, asked: list[SamplingParams]) -> list[int]:
    sampler = Sampler(seed=0)
    return sampler.sample(logits, [sampler.begin(one) for one in asked]).tokens


def their_probabilities(logits: torch.Tensor, asked: SamplingParams) -> torch.Tensor:
    """What transformers' generate would draw from, in its order of filters."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(asked.temperature)])
    if asked.top_k:
        warpers.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        warpers.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p > 0:
        warpers.append(MinPLogitsWarper(asked.min_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())
    return torch.softmax(scores[0], dim=-1)


def our_probabilities(logits: torch.Tensor, asked: SamplingParams, steps: int) -> torch.Tensor:
    """Shares of the unit interval that lead to each token."""
    counts = Counter(draw(logits, asked, (step + 0.5) / steps) for step in range(steps))
    return torch.tensor([counts[token] / steps for token in range(len(logits))])


@settings(max_examples=25, deadline=None)
@given(
    temperature=st.floats(0.3, 2.0),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 100]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1000),
)
def test_the_interval_is_shared_out_as_transformers_does(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = logits_of(1, seed=seed)[0]
    asked = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    steps = 400
    ours = our_probabilities(logits, asked, steps)
    # Each of the tokens' intervals is measured with points 1 / steps apart.
    assert (ours - their_probabilities(logits, asked)).abs().max() <= 1.5 / steps


def test_top_p_finds_the_same_tokens_in_a_large_vocabulary_whether_few_or_many_are_needed() -> None:
    peaked = logits_of(1, vocab=4096, seed=1)[0]
    flat = peaked * 0.01
    for logits, few in ((peaked, True), (flat, False)):
        asked = params(top_p=0.9)
        kept = their_probabilities(logits, asked) > 0
        assert bool(kept.sum() <= 1024) == few
        drawn = {draw(logits, asked, step / 500) for step in range(500)}
        assert all(kept[token] for token in drawn)


def plainly(logits: torch.Tensor, asked: SamplingParams, uniform: float) -> int:
    """The same draw by sorting everything and adding it all up, in float64."""
    scaled = (logits.double() - logits.max().double()) / asked.temperature
    weights, ids = scaled.exp(), torch.arange(len(logits))
    if 0 < asked.top_k < len(logits) or asked.top_p < 1:
        weights, ids = weights.sort(descending=True, stable=True)
        weights[asked.top_k or len(weights) :] = 0
        weights[weights.cumsum(0) - weights >= asked.top_p * weights.sum()] = 0
    weights[weights < asked.min_p * weights.max()] = 0
    sums = weights.cumsum(0)
    return int(ids[torch.searchsorted(sums, uniform * sums[-1], right=True)])


@pytest.mark.parametrize("vocab", [SMALL_VOCAB, CDF_BLOCK, 5 * CDF_BLOCK - 3])
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
def test_a_draw_is_that_of_the_plain_formula(vocab: int, spread: float) -> None:
    logits = logits_of(1, vocab=vocab, seed=2)[0] * spread / 3
    for asked in (
        params(),
        params(top_k=7),
        params(top_p=0.8),
        params(min_p=0.02),
        params(top_k=30, top_p=0.95, min_p=0.01),
        params(temperature=0.2, top_k=vocab - 1),
    ):
        for step in range(40):
            uniform = (step + 0.37) / 40
            assert draw(logits, asked, uniform) == plainly(logits, asked, uniform), asked


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    logits = logits_of(3)
    sampler = Sampler(seed=0)
    states = [sampler.begin(params(temperature=0.0)) for _ in range(3)]
    assert sampler.sample(logits, states).tokens == logits.argmax(-1).tolist()
    assert [state.drawn for state in states] == [0, 0, 0]


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    logits = logits_of(8, seed=3)
    asked = [
        params(temperature=0.0 if row % 4 == 3 else 1.0, seed=row, top_p=0.9, top_k=row)
        for row in range(8)
    ]
    together = sample(logits, asked)
    assert [sample(logits[row : row + 1], asked[row : row + 1])[0] for row in range(8)] == together


def test_a_seed_repeats_its_draws_and_other_seeds_differ() -> None:
    logits = logits_of(1, seed=4)

    def run(seed: int) -> list[int]:
        sampler = Sampler(seed=0)
        state = sampler.begin(params(temperature=2.0, seed=seed))
        return [sampler.sample(logits, [state]).tokens[0] for _ in range(20)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert len(set(run(7))) > 3


def test_requests_without_a_seed_get_different_ones_that_the_engine_seed_repeats() -> None:
    first, second = Sampler(seed=5), Sampler(seed=5)
    seeds = [first.begin(params()).seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert [second.begin(params()).seed for _ in range(3)] == seeds


def test_golden_draws_do_not_change_between_releases() -> None:
    state = DrawState(params(), seed=1)
    assert [round(state.uniform(), 6) for _ in range(3)] == GOLDEN
    assert 0 <= DrawState(params(), seed=-1).uniform() < 1


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    sampler = Sampler(seed=1)
    state = sampler.begin(params(temperature=1.0))
    counts = Counter(sampler.sample(logits[None], [state]).tokens[0] for _ in range(2000))
    # Four standard deviations of a binomial.
    for token, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(counts[token] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_interval_give_tokens_that_the_filters_kept(uniform: float) -> None:
    logits = torch.tensor([0.0, 5.0, float("-inf"), 4.9, float("-inf")])
    for asked in (params(), params(min_p=0.5), params(top_k=2), params(top_p=0.6)):
        assert draw(logits, asked, uniform) in (0, 1, 3)
    assert draw(logits, params(temperature=1e-30), uniform) == 1


def test_log_probabilities_are_of_the_raw_logits_likeliest_first() -> None:
    logits = logits_of(1, seed=6)
    sampler = Sampler(seed=0)
    asked = params(temperature=0.5, top_k=1, logprobs=3)
    reported = sampler.sample(logits, [sampler.begin(asked)]).logprobs[0]
    exact = torch.log_softmax(logits[0].double(), dim=-1)
    assert reported is not None
    best = exact.argsort(descending=True)[:3].tolist()
    assert [token for token, _ in reported.top] == best
    assert reported.chosen == pytest.approx(exact[best[0]].item(), abs=1e-5)
    for token, value in reported.top:
        assert value == pytest.approx(exact[token].item(), abs=1e-5)


def test_log_probabilities_are_given_only_to_those_that_asked() -> None:
    sampler = Sampler(seed=0)
    asked = [params(temperature=0.0), params(temperature=0.0, logprobs=0)]
    choices = sampler.sample(logits_of(2), [sampler.begin(one) for one in asked])
    assert choices.logprobs[0] is None
    assert choices.logprobs[1] is not None
    assert choices.logprobs[1].top == []


def test_an_empty_step_gives_nothing() -> None:
    choices = Sampler(seed=0).sample(torch.empty(0, 5), [])
    assert (choices.tokens, choices.logprobs) == ([], [])
