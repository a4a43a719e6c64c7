"""`kvist eval`: how far each way to compute a model is from float32, measured on its logits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvist.engine.config import EngineConfig
from kvist.engine.demo_text import SYSTEM_PROMPT
from kvist.engine.device.found import find_device
from kvist.engine.kv_dtype import is_float8
from kvist.engine.models.base import Chunk
from kvist.engine.models.files import model_path
from kvist.engine.modes import (
    DEVICE_MODES,
    MODES,
    REFERENCE,
    Mode,
    Subject,
    open_subject,
)
from kvist.engine.tokenizer import load_tokenizer
from kvist.engine.weights import LoadedModel
from kvist.kernels.narrow import FLOAT8, range_shares, to_float8
from kvist.proto.errors import ConfigInvalid

# Tokens that are computed together, each with those before it as its context.
WINDOW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Score:
    """What came of a mode.

    Attributes:
        dtype: of the computation.
        quantization: see load_model.
        kernels: "own", "torch" or "triton".
        weight_bytes: of all weights, as they are kept to compute with.
        perplexity: exp of the mean negative log-likelihood of each next token, in nats.
        kl_mean: of float32's next-token distribution against this mode's, nats, mean of all
            tokens.
        kl_max: of the worst token.
        top1: share of tokens whose likeliest next token is float32's.
        kv_dtype: of K and V.
        kv_scale: of float8, 1 for others.
        kv_clipped: share of K and V beyond float8's largest number, or at it; None for others.
        kv_small: share of them below float8's smallest number with all bits; None for others.
    """

    dtype: str
    quantization: str
    kernels: str
    weight_bytes: int
    perplexity: float
    kl_mean: float
    kl_max: float
    top1: float
    kv_dtype: str
    kv_scale: float
    kv_clipped: float | None = None
    kv_small: float | None = None


def run_eval(flags: argparse.Namespace) -> int:
    """Compare and print; the flags are those of engine/cli.py.

    Raises:
        ConfigInvalid: a flag is wrong, the text is too short, or the mode does not work here.
    """
    text = _read(flags.text) if flags.text else SYSTEM_PROMPT
    tokens = load_tokenizer(model_path(flags.model)).encode(text)[: flags.tokens]
    if len(tokens) < 2:
        raise ConfigInvalid("--tokens: the text has fewer than 2 tokens; give 2 or more")
    config = EngineConfig(model=flags.model, device=flags.device, threads=flags.threads)
    device = find_device(config.device)
    asked = _asked(flags)
    modes: Sequence[Mode] = (asked,) if asked else MODES if device.host else DEVICE_MODES
    console = Console(file=sys.stderr)
    with console.status("float32") as status:
        scores = evaluate(config, tokens, modes, lambda what: status.update(what))
    if flags.json:
        document = {
            "model": flags.model,
            "tokens": len(tokens),
            "threads": flags.threads,
            "device": device.name,
            "modes": [dataclasses.asdict(score) for score in scores],
        }
        print(json.dumps(document))
    else:
        Console().print(as_table(scores, len(tokens)))
    return 0


def _asked(flags: argparse.Namespace) -> Mode | None:
    """The mode that flags name, None when they name none."""
    named = (flags.dtype, flags.quantization, flags.kv_cache_dtype, flags.kv_cache_scale)
    if named == (None,) * len(named):
        return None
    return Mode(
        flags.dtype or "auto",
        flags.quantization or "auto",
        flags.kv_cache_dtype or "auto",
        1.0 if flags.kv_cache_scale is None else flags.kv_cache_scale,
    )


def evaluate(
    config: EngineConfig,
    tokens: Sequence[int],
    modes: Sequence[Mode],
    progress: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Compute the tokens in float32 and in each mode; modes that this device lacks are left out,
    and those that compute with the same weights and pages as one before.

    The log-probabilities of float32 are kept meanwhile: 4 bytes a token and word of the vocabulary.

    Args:
        config: model, device and threads.
        tokens: at least 2; cut into windows that do not see one another.
        modes: to compare. A single one that does not work here raises.
        progress: told what comes next.

    Raises:
        ConfigInvalid: see above.
        ModelFilesError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    reference, *others = (
        dataclasses.replace(config, **dataclasses.asdict(mode)) for mode in (REFERENCE, *modes)
    )
    room = min(len(tokens), WINDOW_TOKENS)
    exact = [part.log_softmax(-1) for part in _windows(open_subject(reference, room), tokens)]
    scores: list[Score] = []
    seen: set[tuple[str, str, str, float]] = set()
    for one in (reference, *others):
        progress(f"{one.dtype}, quantization {one.quantization}, K and V {one.kv_cache_dtype}")
        try:
            subject = open_subject(one, room)
        except ConfigInvalid:
            if len(others) == 1:
                raise
            continue
        loaded = subject.loaded
        what = loaded.dtype, loaded.fingerprint, subject.kv_dtype, one.kv_cache_scale
        # auto of a file without codes is none; int8 of one in 4 bits is auto
        if what not in seen or len(others) == 1:
            seen.add(what)
            scores.append(_score(one, subject, tokens, exact))
        del subject, loaded  # for the next one: a device may not have room for two
    return scores


def _windows(subject: Subject, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
    """The logits of each window, on the host: (tokens of it, vocab)."""
    length = min(WINDOW_TOKENS, subject.model.config.max_model_len)
    pages = range(len(subject.pool))
    for first in range(0, len(tokens), length):
        window = tokens[first : first + length]
        # A chunk for each token gives the logits of each, see Model.forward.
        chunks = [Chunk([token], place, pages, True) for place, token in enumerate(window)]
        yield subject.model.forward(chunks, subject.pool, subject.rounding).cpu()


def _range_shares(subject: Subject, scale: float, count: int) -> tuple[float, float]:
    """See range_shares: of the first tokens in the pages."""
    pool = subject.pool
    codes = pool if pool.dtype == FLOAT8 else to_float8(pool, scale)
    rows = codes.view(torch.uint8).movedim(4, 1).flatten(0, 1)[:count]
    return range_shares(rows.contiguous().view(FLOAT8))


def _score(
    config: EngineConfig, subject: Subject, tokens: Sequence[int], exact: Sequence[torch.Tensor]
) -> Score:
    likelihood, predicted, agreed, place = 0.0, 0, 0, 0
    divergences, shares = [], []
    float8 = is_float8(config.kv_cache_dtype)
    for wanted, logits in zip(exact, _windows(subject, tokens), strict=True):
        given = logits.log_softmax(-1)
        divergences.append((wanted.exp() * (wanted - given)).sum(-1))
        agreed += int((wanted.argmax(-1) == given.argmax(-1)).sum())
        following = torch.tensor(tokens[place + 1 : place + len(given)])
        likelihood += float(given[: len(following)].gather(1, following[:, None]).sum())
        predicted += len(following)
        place += len(given)
        if float8:
            both = _range_shares(subject, config.kv_cache_scale, len(given))
            shares.append(torch.tensor(both) * len(given) / len(tokens))
    divergence = torch.cat(divergences)
    clipped, small = torch.stack(shares).sum(0).tolist() if float8 else (None, None)
    return Score(
        dtype=subject.loaded.dtype,
        quantization=subject.quantization,
        kernels=subject.kernels,
        weight_bytes=weight_bytes(subject.loaded),
        perplexity=math.exp(-likelihood / max(1, predicted)),
        # Rounding can leave a sum below 0, which no divergence is.
        kl_mean=max(0.0, float(divergence.mean())),
        kl_max=max(0.0, float(divergence.max())),
        top1=agreed / len(tokens),
        kv_dtype=subject.kv_dtype,
        kv_scale=config.kv_cache_scale,
        kv_clipped=clipped,
        kv_small=small,
    )


def weight_bytes(loaded: LoadedModel) -> int:
    """Bytes that the weights take: codes where they are kept as codes, else dtype."""
    total = 0
    for name, tensor in loaded.tensors.items():
        group = loaded.groups.get(name)
        if group is None:
            total += tensor.nbytes
        else:
            numbers = [group.scales] if group.offsets is None else [group.scales, group.offsets]
            total += group.codes.numel() * group.bits // 8 + sum(one.nbytes for one in numbers)
    return total


def as_table(scores: Sequence[Score], tokens: int) -> Table:
    """For people."""
    table = Table(title=f"{tokens} tokens against float32", box=SIMPLE_HEAD)
    for name in ("dtype", "weights", "kernels"):
        table.add_column(name)
    for name in ("MB", "perplexity", "KL mean", "KL max", "top-1"):
        table.add_column(name, justify="right")
    for score in scores:
        table.add_row(
            score.dtype if score.kv_clipped is None else f"{score.dtype}*",
            score.quantization,
            score.kernels,
            f"{score.weight_bytes / 1e6:.0f}",
            f"{score.perplexity:.3f}",
            f"{score.kl_mean:.2e}",
            f"{score.kl_max:.2e}",
            f"{score.top1:.1%}",
        )
    table.caption = "\n".join(filter(None, map(_ends, scores))) or None
    return table


def _ends(score: Score) -> str:
    """How the scale fits, "" where there is none."""
    if score.kv_clipped is None or score.kv_small is None:
        return ""
    return (
        f"* K and V fp8 times {score.kv_scale:g}: {score.kv_clipped:.3%} clamped, "
        f"{score.kv_small:.2%} too small for all bits"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"--text {path}: cannot be read: {error}") from error
