"""What the API process and the engine core say to each other: requests in, tokens out."""

from __future__ import annotations

import msgspec

from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.trace import SpanNote, TraceContext

CACHE_ON = "on"
CACHE_BYPASS = "bypass"


class SamplingParams(msgspec.Struct, frozen=True):
    """How tokens are chosen, checked where a request enters (api), trusted below.

    Attributes:
        max_tokens: tokens to generate at most, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities sum to at least this, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
        seed: makes the request's own draws repeatable; None draws from the engine's generator.
        stop_token_ids: ids that end the output (besides the model's own end tokens).
        ignore_eos: go on past the model's own end tokens.
        logprobs: alternatives to report per token, 0 reports the chosen token only; None nothing.
        choice: which of the answers to one prompt this is; matters to seeds.ContentSeeds only.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    choice: int = 0


class NewRequest(msgspec.Struct, frozen=True, tag="new"):
    """Generate from a prompt.

    Attributes:
        id: unique in the life of the engine.
        prompt: token ids, at least one.
        params: how to sample.
        cache_salt: prompts with different salts never share blocks.
        cache: CACHE_ON, or CACHE_BYPASS to neither read nor write any tier (HBM included).
        priority: class, see priority; None is the server's default.
        hint: what the sender says of what comes after it.
        trace: place of its span, None when it is not traced; submitted_s: when it was sent, of
            CLOCK_MONOTONIC, if it is.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    cache_salt: str = ""
    cache: str = CACHE_ON
    priority: int | None = None
    hint: Hint = NO_HINT
    trace: TraceContext | None = None
    submitted_s: float = 0.0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free what it holds; unknown ids are ignored (it may have just ended)."""

    id: str


class CachedTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that were not computed, by the tier that they were in when looked up."""

    hbm: int = 0
    dram: int = 0
    flash: int = 0

    @property
    def total(self) -> int:
        """Tokens from any tier."""
        return self.hbm + self.dram + self.flash


class LoadCost(msgspec.Struct, frozen=True):
    """What loading a prompt's cached blocks was estimated to cost, and what it did.

    Attributes:
        estimated_load_s: to load them.
        estimated_compute_s: to compute what was not loaded, beside it.
        load_s: what the load took.
        skipped_blocks: cached, but computed because that was cheaper.
    """

    estimated_load_s: float
    estimated_compute_s: float
    load_s: float
    skipped_blocks: int


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of a chosen token, and of the likeliest ones beside it.

    Attributes:
        chosen: natural log-probability of the token, before temperature and filters.
        top: (token id, log-probability), likeliest first; as many as asked for.
    """

    chosen: float
    top: list[tuple[int, float]] = []


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one request.

    Attributes:
        id: the request.
        tokens: new token ids, usually one; may be empty in the last delta. A token that ends the
            output is one of them, the last, when finish_reason is "stop"; the API counts it and
            gives it no text.
        logprobs: one per token if asked for, else empty.
        finish_reason: "stop", "length", "abort" or "error" in the last delta, else None.
        error: what went wrong, in words, when finish_reason is "error".
        cached: set in a request's first delta.
        queue_s: seconds from arrival in the core to the first scheduled step; in the first delta.
        prefill_s: seconds from that step to the first token; in the first delta.
        cost: of its load, in its first delta; None when nothing was loaded.
    """

    id: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None
    error: str | None = None
    cached: CachedTokens | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    cost: LoadCost | None = None


class LoadStats(msgspec.Struct, frozen=True):
    """How found prefixes reached their pages since the core started.

    Attributes:
        decisions: "load", "part" or "compute" -> requests whose blocks were found.
        ways: "layers" (beside the computation), "rising" (the same, while blocks still rise from
            flash) or "blocks" (before it) -> loads.
        undone: loads beside the computation that failed, so that it was done again.
        estimated_load_s: summed over the loads.
        estimated_compute_s: of what was not loaded, summed over the same.
        load_s: what the loads took.
        gate_wait_s: how long steps waited for layers.
        gate_waits: how often.
        store_yields: store copies that let loads go first.
        throttled_s: direction -> time that copies waited for its cap.
        rates: what was measured, by name of proto.shm.RATES.
        loaded_bytes: tier -> bytes that were brought in.
        saved_s, moved_s: tier -> prefill that its hits did not take, and what it took to bring them
            in; see cachesvc.core.accounts.worth_s.
        store_s: what stores took.
    """

    decisions: dict[str, int] = {}
    ways: dict[str, int] = {}
    undone: int = 0
    estimated_load_s: float = 0.0
    estimated_compute_s: float = 0.0
    load_s: float = 0.0
    gate_wait_s: float = 0.0
    gate_waits: int = 0
    store_yields: int = 0
    throttled_s: dict[str, float] = {}
    rates: dict[str, int] = {}
    loaded_bytes: dict[str, int] = {}
    saved_s: dict[str, float] = {}
    moved_s: dict[str, float] = {}
    store_s: float = 0.0


class CoreStats(msgspec.Struct, frozen=True):
    """Gauges and running totals of the core since it started; totals only grow.

    Attributes:
        running: requests in the batch.
        waiting: requests queued, waiting for blocks to arrive included.
        pages_total: pages of the pool.
        pages_used: pages that some request holds.
        queries_tokens: prompt tokens looked up (bypassed requests excluded).
        hits_tokens: tier ("hbm", "dram", "flash") -> prompt tokens served from it.
        misses_tokens: reason -> prompt tokens computed; queries = sum(hits) + sum(misses).
        computed_tokens: prompt tokens that went through the model, bypassed requests included.
        generated_tokens: output tokens.
        waiting_deferred: those of waiting that wait for blocks: their own, which are being loaded,
            or such as another request or engine computes.
        waiting_by_class: requests queued, by the class that they came with, see priority.
        loading_by_class: requests whose blocks are being loaded, by the same.
        running_by_class: requests in the batch, by the same.
        preemptions: times a request lost its pages to another, by kind, see step.PREEMPTIONS.
        resumed_tokens: "hbm", "dram", "flash" or "computed" -> tokens of requests that had lost
            their pages, by how they got them back.
        wasted_tokens: tokens computed and thrown away, because their request ended or their
            prefix proved bad while they were under way.
        steps: forward passes.
        step_tokens: tokens of the last step.
        stored_blocks: blocks handed to the cache and committed.
        store_drops: reason -> blocks not stored.
        cache_state: "off", "attached" or "detached".
        reattaches: times that the client attached again after losing its sidecar.
        loads: see there.
        load_seconds: time spent waiting for or copying blocks in, summed over requests.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    queries_tokens: int = 0
    hits_tokens: dict[str, int] = {}
    misses_tokens: dict[str, int] = {}
    computed_tokens: int = 0
    generated_tokens: int = 0
    waiting_deferred: int = 0
    waiting_by_class: tuple[int, ...] = ()
    loading_by_class: tuple[int, ...] = ()
    running_by_class: tuple[int, ...] = ()
    preemptions: dict[str, int] = {}
    resumed_tokens: dict[str, int] = {}
    wasted_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    stored_blocks: int = 0
    store_drops: dict[str, int] = {}
    cache_state: str = "off"
    reattaches: int = 0
    load_seconds: float = 0.0
    loads: LoadStats = LoadStats()


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one step produced, with the core's figures after it.

    Attributes:
        notes: spans of traced requests that have ended.
    """

    deltas: list[Delta]
    stats: CoreStats
    notes: list[SpanNote] = []


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How far the model is loaded; comes zero or more times before Ready.

    Attributes:
        done: tensors read so far, at most total.
        total: tensors of the model, >= 1.
        what: is being done instead, for people; "" reads tensors.
    """

    done: int
    total: int
    what: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The core has loaded its model and takes requests.

    Attributes:
        max_model_len: tokens of prompt and output together.
        block_tokens: tokens per block and page.
        pages: pages in the pool.
        page_bytes: bytes of one page.
        dtype: what is computed in, "bfloat16" or "float32"; never "auto".
        kv_dtype: of K and V in every tier, one of proto.layout.DTYPE_BYTES.
        namespace: hex digest under which blocks are shared.
        kernels: what computes, for people.
        device: where, for people.
        kv_scale: what numbers of kv_dtype are multiplied by.
        cache: the tiers beyond the pool, for people.
    """

    max_model_len: int
    block_tokens: int
    pages: int
    page_bytes: int
    dtype: str
    kv_dtype: str
    namespace: str
    kernels: str = ""
    device: str = ""
    kv_scale: float = 1.0
    cache: str = ""


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The core cannot start or go on; the message is for the operator."""

    message: str


ToCore = NewRequest | Abort
FromCore = Outputs | Loading | Ready | Fatal
