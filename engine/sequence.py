"""A sequence: the state of one request inside the core, from its arrival to its last token."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvist.cachesvc.events.journal import Facts
from kvist.cachesvc.worker.cost import Choice
from kvist.engine.loading import LoadGate
from kvist.engine.priority import INTERACTIVE
from kvist.engine.request import CachedTokens, LoadCost, NewRequest
from kvist.engine.sequence_trace import SequenceTrace
from kvist.proto.keys import NO_KEY, BlockKey, KeyChain, Namespace, origin_of, tenant_of
from kvist.proto.kv_events import space_name

if TYPE_CHECKING:  # the schedule needs no torch, and so its tests need none
    from kvist.engine.sampler import DrawState

SALTS_REMEMBERED = 1024
"""Digests kept, one per tenant salt; making one again costs 20 us."""


class State(enum.Enum):
    """Where a sequence is; it holds pages in LOADING and RUNNING only."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


class Digests:
    """Namespace digests by tenant salt, a bounded number of them."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._by_salt: OrderedDict[str, bytes] = OrderedDict()

    def of(self, salt: str) -> bytes:
        """The digest that seeds the keys of this tenant's blocks."""
        digest = self._by_salt.get(salt)
        if digest is None:
            digest = self._namespace.salted(salt).digest()
            self._by_salt[salt] = digest
            if len(self._by_salt) > SALTS_REMEMBERED:
                self._by_salt.popitem(last=False)
        self._by_salt.move_to_end(salt)
        return digest


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for every sequence of a core.

    Attributes:
        max_model_len: tokens of prompt and output together.
        block_tokens: tokens per page.
        eos_token_ids: tokens that end an output unless the request ignores them.
    """

    max_model_len: int
    block_tokens: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens, pages and history.

    Attributes:
        request: what was asked.
        number: order of arrival; lower is older.
        limits: see there.
        digest: namespace digest of its keys; None reuses and keeps nothing (a bypass).
        arrived_s: when it came, on the core's clock.
        priority: its class, see there.
        rank: its class as the schedule sees it: waiting has raised it, see rank_at.
        waited_s: how long it has waited, without the wait that goes on.
        since_s: when the wait that goes on began; None while it decodes.
        draws: its own random stream; the runner's.
        tokens: prompt and output so far.
        pages: page of position p is pages[p // block_tokens].
        computed: positions whose KV is in the pages and sound, from the start.
        planned: the same, with those that a step under way computes or a gated load brings.
        pending: tokens that steps under way will give.
        life: counts how often what was planned was given up; see scheduler.Work.
        preempted: times that it lost its pages.
        registered: leading pages that are complete and in the index of pages.
        found: tier of each block, from block `registered` on, that the cache was seen to hold
            when the sequence was admitted.
        rose: numbers of blocks that were on flash when the request arrived; hits of flash, wherever
            they are found then.
        found_end: why the cache had no more, a miss reason.
        rise_s: how long they had risen when it was let in, as far as that is known.
        follow_until_s: it was let in although blocks still rise, and its load waits for them until
            then; 0 if not.
        choice: what of that is loaded and what is not, and what it was estimated to cost.
        cost: what its load was estimated to cost and what it did, once it has ended.
        gate: of a load that is under way while the sequence computes. As long as there is one, what
            it has computed is provisional: nothing is registered, sampled from, stored or counted.
        flight_late: it waited for a block that another engine computed, in vain.
        counted: its lookup was counted.
        store_stopped: a block of it was dropped; those after it would have no parent in the cache.
        cached: prompt tokens that were not computed, by tier.
        trace: what is noted of it; None when it is not traced.
        finish_reason: "stop" or "length" once its last token is there.
        scheduled_s: when its first step began.
        first_token_s: when it had its first token.
        tenant: whose it is, see proto.keys.tenant_of.
    """

    request: NewRequest
    number: int
    limits: Limits
    digest: bytes | None
    arrived_s: float
    priority: int = INTERACTIVE
    rank: int = INTERACTIVE
    waited_s: float = 0.0
    since_s: float | None = None
    draws: DrawState | None = None
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    planned: int = 0
    pending: int = 0
    life: int = 0
    preempted: int = 0
    registered: int = 0
    found: tuple[str, ...] = ()
    found_end: str = ""
    rose: frozenset[int] = frozenset()
    rise_s: float = 0.0
    follow_until_s: float = 0.0
    choice: Choice | None = None
    gate: LoadGate | None = None
    cost: LoadCost | None = None
    flight_late: bool = False
    counted: bool = False
    store_stopped: bool = False
    cached: CachedTokens = field(default_factory=CachedTokens)
    trace: SequenceTrace | None = None
    finish_reason: str | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    tenant: str = ""
    _chain: KeyChain | None = None
    _hashed: int = 0
    _stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.tenant = tenant_of(self.request.cache_salt)
        self.rank, self.since_s = self.priority, self.arrived_s
        if self.request.trace is not None:
            self.trace = SequenceTrace(self.request.trace, self.request.submitted_s)
        if self.digest is not None:
            self._chain = KeyChain(self.digest, self.limits.block_tokens)
        params = self.request.params
        eos = () if params.ignore_eos else self.limits.eos_token_ids
        self._stops = frozenset((*eos, *params.stop_token_ids))

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def length(self) -> int:
        """Tokens, with those that steps under way will give."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens whose KV is missing and not under way; 1 while it decodes."""
        return self.length - self.planned

    @property
    def ending(self) -> bool:
        """A token under way is its last one, whatever it is."""
        return self.pending > 0 and self._full(self.length)

    @property
    def place(self) -> tuple[int, int]:
        """Lower is sooner: by class, then by arrival."""
        return self.rank, self.number

    @property
    def usable_blocks(self) -> int:
        """Full blocks that need not be computed; the last token always is, for its logits."""
        return (len(self.tokens) - 1) // self.limits.block_tokens

    @property
    def pages_needed(self) -> int:
        """Pages that hold all tokens there are, with those under way."""
        return -(-self.length // self.limits.block_tokens)

    @property
    def reuses(self) -> bool:
        """It may read and write the cache, the HBM tier included."""
        return self._chain is not None

    def rank_at(self, now: float, aging_s: float) -> int:
        """Its class, raised by one for each aging_s seconds that it has waited."""
        waited_s = self.waited_s + (0.0 if self.since_s is None else now - self.since_s)
        return max(0, self.priority - int(waited_s / aging_s))

    def stop_waiting(self, now: float) -> None:
        """Its prompt is done: from here on it gets a token in every step."""
        if self.since_s is not None:
            self.waited_s += now - self.since_s
            self.since_s = None

    def keys(self) -> list[BlockKey]:
        """Keys of all full blocks of the tokens so far; none for a bypass. Do not change it."""
        if self._chain is None:
            return []
        fresh = len(self.tokens) - self._hashed
        if fresh >= self.limits.block_tokens - self._hashed % self.limits.block_tokens:
            self._chain.extend(self.tokens[self._hashed :])
            self._hashed = len(self.tokens)
        return self._chain.keys

    def parent(self, block: int) -> BlockKey:
        """Key of the block before a block."""
        return self.keys()[block - 1] if block else NO_KEY

    def block_tokens_bytes(self, block: int) -> bytes:
        """A full block's own tokens as little-endian uint32."""
        size = self.limits.block_tokens
        return np.asarray(self.tokens[block * size : (block + 1) * size], dtype="<u4").tobytes()

    def origin(self) -> bytes:
        """Of its first block, which is full; see proto.keys.origin_of."""
        return origin_of(self.request.cache_salt, self.block_tokens_bytes(0))

    def facts(self, block: int) -> Facts:
        """What routers are told of a full block of it."""
        assert self.digest is not None
        space = space_name(self.digest) if self.request.cache_salt else ""
        return Facts(self.parent(block), self.block_tokens_bytes(block), space)

    def append(self, token: int) -> None:
        """Take a generated token; sets finish_reason if it is the last."""
        self.tokens.append(token)
        if token in self._stops:
            self.finish_reason = "stop"
        elif self._full(len(self.tokens)):
            self.finish_reason = "length"

    def _full(self, length: int) -> bool:
        """So many tokens are all that it may have."""
        allowed = self.prompt_tokens + self.request.params.max_tokens
        return length >= min(allowed, self.limits.max_model_len)
