"""Keys: equal names mean equal prefixes in equal namespaces."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.proto.keys import DIGEST_BYTES, KeyChain, Namespace, block_keys
from kvist.proto.layout import BlockFormat

FORMAT = BlockFormat(layers=2, kv_heads=3, head_dim=8, dtype="bfloat16", block_tokens=4)
NAMESPACE = Namespace("model", FORMAT, "theta=1", "bfloat16/cpu", "adapter", "salt")
DIGEST = NAMESPACE.digest()

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(tokens, st.integers(1, 9))
def test_a_key_is_the_hash_of_the_namespace_and_the_whole_prefix(
    prompt: list[int], block_tokens: int
) -> None:
    keys = block_keys(DIGEST, np.array(prompt, np.uint32), block_tokens)
    assert len(keys) == len(prompt) // block_tokens
    for index, key in enumerate(keys):
        prefix = np.array(prompt[: (index + 1) * block_tokens], "<u4").tobytes()
        assert key == hashlib.sha256(DIGEST + prefix).digest()[:16]


@given(tokens, st.lists(st.integers(0, 60), max_size=6))
def test_a_chain_fed_in_pieces_gives_the_keys_of_the_whole(
    prompt: list[int], cuts: list[int]
) -> None:
    chain = KeyChain(DIGEST, 4)
    edges = sorted({0, len(prompt), *(min(cut, len(prompt)) for cut in cuts)})
    added = sum(
        chain.extend(np.array(prompt[start:stop], np.uint32))
        for start, stop in itertools.pairwise(edges)
    )
    assert chain.keys == block_keys(DIGEST, np.array(prompt, np.uint32), 4)
    assert added == len(chain.keys)


@given(tokens.filter(lambda prompt: len(prompt) >= 8), st.data())
def test_a_changed_token_changes_the_keys_from_its_block_on_and_none_before(
    prompt: list[int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(prompt) // 4 * 4 - 1))
    changed = list(prompt)
    changed[position] ^= 1
    before = block_keys(DIGEST, np.array(prompt, np.uint32), 4)
    after = block_keys(DIGEST, np.array(changed, np.uint32), 4)
    block = position // 4
    assert before[:block] == after[:block]
    assert not set(before[block:]) & set(after[block:])


@pytest.mark.parametrize("field", ["model", "rope", "compute", "adapter", "salt"])
def test_every_field_of_a_namespace_is_in_its_digest(field: str) -> None:
    other = dataclasses.replace(NAMESPACE, **{field: getattr(NAMESPACE, field) + "x"})
    assert other.digest() != DIGEST


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BlockFormat)])
def test_every_field_of_the_block_format_is_in_the_digest(field: str) -> None:
    value: Any = "float16" if field == "dtype" else getattr(FORMAT, field) + 1
    other = dataclasses.replace(NAMESPACE, format=dataclasses.replace(FORMAT, **{field: value}))
    assert other.digest() != DIGEST


def test_text_does_not_run_from_one_field_into_the_next() -> None:
    first = dataclasses.replace(NAMESPACE, adapter="ab", salt="c")
    second = dataclasses.replace(NAMESPACE, adapter="a", salt="bc")
    assert first.digest() != second.digest()


def test_tenants_with_different_salts_never_share_a_key() -> None:
    prompt = np.arange(16, dtype=np.uint32)
    assert NAMESPACE.salted("salt").digest() == DIGEST
    keys = [block_keys(NAMESPACE.salted(it).digest(), prompt, 4) for it in ("", "a", "b")]
    assert len({key for chain in keys for key in chain}) == 12


def test_the_digest_has_its_length() -> None:
    assert len(DIGEST) == DIGEST_BYTES


@pytest.mark.parametrize(("digest", "block_tokens"), [(b"short", 4), (DIGEST, 0)])
def test_a_chain_refuses_what_it_cannot_use(digest: bytes, block_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"digest|block_tokens"):
        KeyChain(digest, block_tokens)
