"""From flags to requests."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvist.engine.bench.timed_trace import TimedTrace
from kvist.engine.bench.workload import (
    Count,
    Item,
    RandomPrompts,
    RepeatedPrefixes,
    Vocabulary,
    burstgpt_items,
    custom_items,
    sharegpt_items,
)
from kvist.proto.errors import ConfigInvalid


def items_of(flags: argparse.Namespace, vocabulary: Vocabulary, count: Count) -> list[Item]:
    """Make the requests that the flags of bench/flags.py describe.

    Args:
        vocabulary: what made-up prompts are made of.
        count: tokens of a text.

    Raises:
        ConfigInvalid: a flag or a file is wrong; the message names it.
    """
    if flags.dataset_name in ("random", "prefix_repetition"):
        return _made_up(flags).items(vocabulary, flags.num_prompts, flags.seed)
    if flags.dataset_path is None:
        raise ConfigInvalid(f"--dataset-path: {flags.dataset_name} is a file; say which")
    path = Path(flags.dataset_path)
    if flags.dataset_name == "sharegpt":
        wanted = _either(flags.output_len, flags.sharegpt_output_len)
        return sharegpt_items(path, flags.num_prompts, flags.seed, count, wanted)
    if flags.dataset_name == "burstgpt":
        return burstgpt_items(path, flags.num_prompts, flags.seed, vocabulary)
    if flags.dataset_name == "custom":
        wanted = _either(flags.output_len, flags.custom_output_len)
        assert wanted is not None
        return custom_items(path, flags.num_prompts, count, wanted)
    trace = TimedTrace(
        path,
        flags.timed_trace_chunk_hash_size,
        flags.timed_trace_sec_multiplier,
        flags.timed_trace_input_scale,
        flags.timed_trace_output_scale,
        flags.timed_trace_max_len,
    )
    return trace.items(vocabulary, flags.num_prompts, flags.seed)


def _made_up(flags: argparse.Namespace) -> RandomPrompts | RepeatedPrefixes:
    if flags.dataset_name == "random":
        return RandomPrompts(
            _either(flags.input_len, flags.random_input_len) or 0,
            _either(flags.output_len, flags.random_output_len) or 0,
            flags.random_prefix_len,
            flags.random_range_ratio,
        )
    return RepeatedPrefixes(
        flags.prefix_repetition_prefix_len,
        flags.prefix_repetition_suffix_len,
        flags.prefix_repetition_num_prefixes,
        _either(flags.output_len, flags.prefix_repetition_output_len) or 0,
    )


def _either(first: int | None, second: int | None) -> int | None:
    return second if first is None else first
