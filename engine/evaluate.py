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
from kvist.engine.models.base import Chunk, Model
from kvist.engine.models.build import build_model, own_kernels_refuse, quantization_of
from kvist.engine.models.files import model_path
from kvist.engine.tokenizer import load_tokenizer
from kvist.engine.weights import LoadedModel, load_model
from kvist.proto.errors import ConfigInvalid
from kvist.tiers.hbm import PagePool

BLOCK_TOKENS = 64
# Tokens that are computed together, each with those before it as its context.
WINDOW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to compute, as the flags of `kvist serve` say it."""

    dtype: str
    quantization: str


@dataclass(frozen=True, slots=True)
class Score:
    """What came of a mode.

    Attributes:
        dtype: of the computation.
        quantization: see EngineConfig.
        kernels: "own" or "torch".
        weight_bytes: of all weights, as they are kept to compute with.
        perplexity: exp of the mean negative log-likelihood of each next token, in nats.
        kl_mean: of float32's next-token distribution against this mode's, nats, mean of all
            tokens.
        kl_max: of the worst token.
        top1: share of tokens whose likeliest next token is float32's.
    """

    dtype: str
    quantization: str
    kernels: str
    weight_bytes: int
    perplexity: float
    kl_mean: float
    kl_max: float
    top1: float


REFERENCE = Mode("float32", "none")
MODES = (
    Mode("bfloat16", "none"),
    Mode("bfloat16", "auto"),
    Mode("bfloat16", "int8"),
    Mode("bfloat16", "int4"),
)


def run_eval(flags: argparse.Namespace) -> int:
    """Compare and print; the flags are those of engine/cli.py.

    Raises:
        ConfigInvalid: a flag is wrong, the text is too short, or the mode does not work here.
    """
    text = _read(flags.text) if flags.text else SYSTEM_PROMPT
    tokens = load_tokenizer(model_path(flags.model)).encode(text)[: flags.tokens]
    if len(tokens) < 2:
        raise ConfigInvalid("--tokens: the text has fewer than 2 tokens; give 2 or more")
    modes: Sequence[Mode] = MODES
    if flags.dtype or flags.quantization:
        modes = (Mode(flags.dtype or "auto", flags.quantization or "auto"),)
    console = Console(file=sys.stderr)
    with console.status("float32") as status:
        scores = evaluate(
            flags.model, tokens, modes, flags.threads, lambda what: status.update(what)
        )
    if flags.json:
        document = {"model": flags.model, "tokens": len(tokens), "threads": flags.threads}
        print(json.dumps(document | {"modes": [dataclasses.asdict(score) for score in scores]}))
    else:
        Console().print(as_table(scores, len(tokens)))
    return 0


def evaluate(
    model: str,
    tokens: Sequence[int],
    modes: Sequence[Mode],
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Compute the tokens in float32 and in each mode; modes that this machine lacks are left out,
    and those that compute with the same weights as one before.

    The log-probabilities of float32 are kept meanwhile: 4 bytes a token and word of the vocabulary.

    Args:
        model: as for `kvist serve`.
        tokens: at least 2; cut into windows that do not see one another.
        modes: to compare. A single one that does not work here raises.
        threads: to compute with.
        progress: told what comes next.

    Raises:
        ConfigInvalid: see above.
        ModelFilesError: the model cannot be loaded.
    """
    if threads < 1:
        raise ConfigInvalid(f"--threads: {threads} is out of range; give 1 or more")
    torch.set_num_threads(threads)
    exact = [part.log_softmax(-1) for part in _logits(model, REFERENCE, tokens, threads)[1]]
    scores: list[Score] = []
    seen: set[tuple[str, str]] = set()
    for mode in (REFERENCE, *modes):
        progress(f"{mode.dtype}, quantization {mode.quantization}")
        try:
            loaded, parts = _logits(model, mode, tokens, threads)
        except ConfigInvalid:
            if len(modes) == 1:
                raise
            continue
        what = loaded.dtype, loaded.fingerprint
        if what in seen and len(modes) > 1:
            continue  # auto of a file without codes is none; int8 of one in 4 bits is auto
        seen.add(what)
        scores.append(_score(mode, loaded, tokens, exact, parts))
    return scores


def _logits(
    path: str, mode: Mode, tokens: Sequence[int], threads: int
) -> tuple[LoadedModel, Iterator[torch.Tensor]]:
    """The model, and the logits of each window: (tokens of it, vocab)."""
    config = EngineConfig(
        model=path,
        dtype=mode.dtype,
        quantization=mode.quantization,
        threads=threads,
        block_tokens=BLOCK_TOKENS,
    )
    loaded = load_model(path, mode.dtype, quantization=quantization_of(config))
    model = build_model(config, loaded, loaded.dtype)
    return loaded, _windows(model, loaded, tokens)


def _windows(model: Model, loaded: LoadedModel, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
    length = min(WINDOW_TOKENS, model.config.max_model_len)
    pages = range(-(-length // BLOCK_TOKENS))
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, loaded.dtype), len(pages)).tensor
    for first in range(0, len(tokens), length):
        window = tokens[first : first + length]
        # A chunk for each token gives the logits of each, see Model.forward.
        chunks = [Chunk([token], place, pages, True) for place, token in enumerate(window)]
        yield model.forward(chunks, pool)


def _score(
    mode: Mode,
    loaded: LoadedModel,
    tokens: Sequence[int],
    exact: Sequence[torch.Tensor],
    parts: Iterator[torch.Tensor],
) -> Score:
    likelihood, predicted, agreed, place = 0.0, 0, 0, 0
    divergences = []
    for wanted, logits in zip(exact, parts, strict=True):
        given = logits.log_softmax(-1)
        divergences.append((wanted.exp() * (wanted - given)).sum(-1))
        agreed += int((wanted.argmax(-1) == given.argmax(-1)).sum())
        following = torch.tensor(tokens[place + 1 : place + len(given)])
        likelihood += float(given[: len(following)].gather(1, following[:, None]).sum())
        predicted += len(following)
        place += len(given)
    divergence = torch.cat(divergences)
    own = not own_kernels_refuse(loaded.config, loaded.dtype, loaded.dtype)
    return Score(
        dtype=loaded.dtype,
        quantization=mode.quantization,
        kernels="own" if own else "torch",
        weight_bytes=weight_bytes(loaded),
        perplexity=math.exp(-likelihood / max(1, predicted)),
        # Rounding can leave a sum below 0, which no divergence is.
        kl_mean=max(0.0, float(divergence.mean())),
        kl_max=max(0.0, float(divergence.max())),
        top1=agreed / len(tokens),
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
            score.dtype,
            score.quantization,
            score.kernels,
            f"{score.weight_bytes / 1e6:.0f}",
            f"{score.perplexity:.3f}",
            f"{score.kl_mean:.2e}",
            f"{score.kl_max:.2e}",
            f"{score.top1:.1%}",
        )
    return table


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"--text {path}: cannot be read: {error}") from error
