"""The block format: every byte of a block has one meaning."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.proto.layout import DTYPE_BYTES, BlockFormat
from kvist.proto.record import PAGE_BYTES, RecordShape

formats = st.builds(
    BlockFormat,
    layers=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 96),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block_tokens=st.integers(1, 70),
    first_layer=st.integers(0, 3),
    first_head=st.integers(0, 3),
)


@given(formats)
def test_regions_cover_the_block_once_without_gaps(format: BlockFormat) -> None:
    position = 0
    for region in format.regions():
        assert region.offset == position
        position += region.length
    assert position == format.payload_bytes


@given(formats)
def test_each_layer_kind_and_head_has_one_region_in_c_order(format: BlockFormat) -> None:
    names = [(region.layer, region.kind, region.head) for region in format.regions()]
    assert len(set(names)) == format.layers * 2 * format.kv_heads
    assert names == sorted(names)
    assert names[0] == (format.first_layer, "k", format.first_head)


def test_a_block_of_a_known_model_has_the_known_length() -> None:
    smollm2 = BlockFormat(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16", block_tokens=64)
    assert smollm2.region_bytes == 64 * 64 * 2
    assert smollm2.payload_bytes == 1_474_560


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("kv_heads", 0),
        ("head_dim", -1),
        ("block_tokens", 0),
        ("first_layer", -1),
        ("first_head", -1),
        ("dtype", "int3"),
    ],
)
def test_a_format_that_cannot_be_is_refused_by_the_name_of_its_field(
    field: str, value: object
) -> None:
    fields: dict[str, Any] = {
        "layers": 1,
        "kv_heads": 1,
        "head_dim": 1,
        "dtype": "float16",
        "block_tokens": 1,
        field: value,
    }
    with pytest.raises(ValueError, match=field):
        BlockFormat(**fields)


@given(st.integers(0, 10**7), st.integers(1, 5000))
def test_a_record_is_whole_pages_and_its_parts_fit(payload_bytes: int, block_tokens: int) -> None:
    shape = RecordShape(payload_bytes, block_tokens)
    assert shape.header_bytes % PAGE_BYTES == shape.record_bytes % PAGE_BYTES == 0
    assert shape.header_bytes >= 128 + 4 * block_tokens
    assert 0 <= shape.record_bytes - shape.header_bytes - payload_bytes < PAGE_BYTES
