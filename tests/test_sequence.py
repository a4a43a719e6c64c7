"""One request's state: its keys as it grows, and when it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import SALTS_REMEMBERED, Digests, Limits, Sequence
from kvist.proto.keys import Namespace, block_keys
from kvist.proto.layout import BlockFormat

SIZE = 4
LIMITS = Limits(max_model_len=100, block_tokens=SIZE, eos_token_ids=(7,))
NAMESPACE = Namespace("m", BlockFormat(1, 1, 2, "float32", SIZE), "none", "float32")
DIGEST = NAMESPACE.digest()


def make(prompt: list[int], reuse: bool = True, **params: object) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 50, **params})  # type: ignore[arg-type]
    return Sequence(NewRequest("r", prompt, sampling), 1, LIMITS, DIGEST if reuse else None, 0.0)


@given(
    prompt=st.lists(st.integers(10, 99), min_size=1, max_size=20),
    output=st.lists(st.integers(10, 99), max_size=20),
    looks=st.sets(st.integers(0, 20)),
)
def test_keys_are_those_of_all_tokens_whenever_they_are_asked_for(
    prompt: list[int], output: list[int], looks: set[int]
) -> None:
    sequence = make(prompt)
    for count, token in enumerate(output):
        sequence.append(token)
        if count in looks:
            assert sequence.keys() == block_keys(DIGEST, sequence.tokens, SIZE)
    assert sequence.keys() == block_keys(DIGEST, prompt + output, SIZE)


def test_the_last_token_is_never_taken_from_a_cache() -> None:
    assert [make([1] * length).usable_blocks for length in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


def test_a_bypass_has_no_keys() -> None:
    assert make([1] * 9, reuse=False).keys() == []


def test_an_end_token_ends_it_unless_the_request_ignores_it() -> None:
    taking, ignoring = make([1]), make([1], ignore_eos=True, stop_token_ids=(9,))
    for sequence in (taking, ignoring):
        sequence.append(7)
    assert (taking.finish_reason, ignoring.finish_reason) == ("stop", None)
    ignoring.append(9)
    assert (ignoring.finish_reason, ignoring.output) == ("stop", [7, 9])


def test_max_tokens_ends_it() -> None:
    sequence = make([1], max_tokens=2)
    sequence.append(50)
    assert sequence.finish_reason is None
    sequence.append(50)
    assert sequence.finish_reason == "length"


def test_digests_differ_by_tenant_and_their_number_is_bounded() -> None:
    digests = Digests(NAMESPACE)
    assert digests.of("") == DIGEST
    assert digests.of("a") == NAMESPACE.salted("a").digest() != DIGEST
    for number in range(2 * SALTS_REMEMBERED):
        digests.of(str(number))
    assert len(digests._by_salt) == SALTS_REMEMBERED
