"""What a step is made of, as addresses and counts that numba takes without any work."""

from __future__ import annotations

from typing import NamedTuple


class Weights(NamedTuple):
    """A model's shape and where its weights are: addresses of contiguous arrays.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, inner: as in ModelConfig.
        block_tokens: tokens of a page.
        vocab: rounded up to a whole tile.
        eps: added to the mean square of a row.
        tiles: int64, (layers, 4, 2): where the tiles of QKV, OUT, GATE_UP and DOWN begin, and
            their kind: BF16, INT8 or INT4, see linear.
        head: where the tiles of the output projection begin.
        head_kind: their kind.
        norms: float32, (2 * layers + 1, hidden): before attention and MLP of each layer, and at
            the end.
        embedding: bfloat16, (vocab, hidden).
        cos: float32, (positions, head_dim / 2).
        sin: same shape.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    block_tokens: int
    vocab: int
    eps: float
    tiles: int
    head: int
    head_kind: int
    norms: int
    embedding: int
    cos: int
    sin: int


class Rows(NamedTuple):
    """What a step computes; counts, and addresses of contiguous arrays of int64.

    Attributes:
        rows: of the step.
        blocks: rows of one sequence that are all in the last of their pages.
        wanted: rows whose logits are wanted.
        tokens: (rows,), ids.
        positions: (rows,).
        places: (rows, 2): page, and place in the page, of each row's K and V.
        block: (blocks, 5): first row, rows, where its pages begin in tables, how many, place of
            the first row in its page.
        tables: pages of the sequences, one after the other.
        last: (wanted,), rows.
        pool: where the paged pool begins.
    """

    rows: int
    blocks: int
    wanted: int
    tokens: int
    positions: int
    places: int
    block: int
    tables: int
    last: int
    pool: int


class Room(NamedTuple):
    """Memory of a step, for at least as many rows as it has; addresses.

    Attributes:
        hidden: float32, (rows, hidden).
        normed: bfloat16, (rows, hidden).
        projected: float32, (rows, (heads + 2 kv_heads) * head_dim).
        queries: bfloat16, (kv_heads, rows, groups, head_dim).
        attended: bfloat16, (rows, heads * head_dim).
        inner: bfloat16, (rows, intermediate).
        sums: float32, (most inputs / 32, rows): of groups of inputs, for weights in codes.
        logits: float32, (wanted rows, vocab rounded up).
        scratch: for each thread its own.
        scratch_bytes: of a thread.
    """

    hidden: int
    normed: int
    projected: int
    queries: int
    attended: int
    inner: int
    sums: int
    logits: int
    scratch: int
    scratch_bytes: int


class Step(NamedTuple):
    """What one thread has of a step.

    Attributes:
        scratch: its own.
        sync: see work.
        weights: of the model.
        rows: to compute.
        room: that all threads share.
    """

    scratch: int
    sync: int
    weights: Weights
    rows: Rows
    room: Room
