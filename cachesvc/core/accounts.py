"""Accounts: what each tenant asked for, saved, moved and holds; a bounded number of them.

    requested tokens = hit(tier) + miss(reason)

Every lookup of every worker is in one row of a ring (worker/tenants), and a row in one account, so
the sum over the accounts is the whole, in every reading. A tenant that has no account of its own is
part of OTHER. What it is worth is defined in worth_s, and nowhere else.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import add

from kvist.cachesvc.catalog.blocks import Blocks
from kvist.proto.histograms import MICRO
from kvist.proto.shm import MISS_REASONS, MOVED_TIERS, TENANT_COUNTERS, TIERS

# In brackets, as no tenant is called (proto.keys.tenant_of).
COMMON = "(common)"
OTHER = "(other)"
NAMESPACES_MAX = 16
ACCOUNTS_MAX = 128
MODEL_CHARS_MAX = 48
# Digests whose owner is remembered; one that is forgotten is told again with its next prompt.
DIGESTS_MAX = 65536
# What is held is added up anew when so much time has passed for each namespace that has blocks:
# 10,000 of them take 4 ms.
HELD_S = 1e-4

_UNSHOWN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose tokens and blocks are: labels, out of a bounded set.

    Attributes:
        namespace: model and the first digits of the digest, without tenant; or OTHER.
        tenant: name, COMMON for requests without a salt, or OTHER.
    """

    namespace: str
    tenant: str


@dataclass(frozen=True, slots=True)
class TenantUse:
    """One account; requested_tokens = sum of hit_tokens and miss_tokens.

    Attributes:
        lookups: requests that asked the cache.
        saved_s: tier -> seconds of prefill that its hits did not take, see worth_s.
        load_s: tier -> seconds that workers took to bring hits in.
        load_bytes: tier -> bytes that they brought in.
        store_s: seconds that workers took to copy blocks out, stored_blocks of them.
        net_s: what the sidecar's tiers saved less what was moved, without what its disk took, see
            worth_s.
        held_blocks: tier -> copies there now.
    """

    namespace: str
    tenant: str
    lookups: int
    requested_tokens: int
    hit_tokens: dict[str, int]
    miss_tokens: dict[str, int]
    saved_s: dict[str, float]
    load_s: dict[str, float]
    load_bytes: dict[str, int]
    store_s: float
    stored_blocks: int
    net_s: float
    held_blocks: dict[str, int]


@dataclass(frozen=True, slots=True)
class Worth:
    """What a tier is worth, see worth_s.

    Attributes:
        saved_tokens: prompt tokens that were found in it and not computed.
        saved_s: that they would have taken. load_s: workers took to bring them in.
        store_s: it took to bring blocks there: to DRAM workers' copies, to flash writes.
        net_s: what is left.
    """

    tier: str
    saved_tokens: int
    saved_s: float
    load_s: float
    store_s: float
    net_s: float


def worth_s(saved_s: float, load_s: float, store_s: float) -> float:
    """Seconds won: saved_s - load_s - store_s.

    What the sidecar is worth, to all or to a tenant, is this of the tiers that it moves blocks to
    (MOVED_TIERS): hits in an engine's own HBM would be there without it, and are only shown beside.

    Args:
        saved_s: prefill that was not computed: for each request a * tokens + b * sum of positions
            of its hit tokens, a and b as its worker had measured them by then (worker/cost). The
            constant of a step is left out, as the rest of the prompt takes a step anyway. What was
            hit before a worker had measured a prefill is valued when it has.
        load_s: from when a load was begun to when its blocks were there, verified, and for flash
            also how long the request was passed over while they rose.
        store_s: copies into DRAM, their calls included; writes to flash.

    All copying counts, that beside a computation too, so the worth is rather more than less.
    """
    return saved_s - load_s - store_s


def namespace_label(model: str, digest: bytes) -> str:
    """A short readable name: the model's last part and 8 digits of the namespace's digest."""
    name = _UNSHOWN.sub("-", model.rstrip("/").rpartition("/")[2])[:MODEL_CHARS_MAX]
    return f"{name or 'kv'}-{digest.hex()[:8]}"


class Accounts:
    """Adds up what workers counted. One thread.

    An owner is known from its first reading on and for ever, so that its totals only grow: the
    first NAMESPACES_MAX namespaces and the first ACCOUNTS_MAX pairs that workers count by
    themselves.
    """

    def __init__(self) -> None:
        self._owners: dict[tuple[str, str], Owner] = {}
        self._namespaces: set[str] = {OTHER}
        self._ended: dict[Owner, list[int]] = {}
        self._whose: OrderedDict[bytes, tuple[str, str]] = OrderedDict()
        self._held: dict[Owner, dict[str, int]] = {}
        self._held_until_s = 0.0

    def introduce(self, digest: bytes, namespace: str, tenant: str) -> None:
        """A worker says whose a digest is; namespace as namespace_label says."""
        if digest not in self._whose:
            self._whose[digest] = (namespace, tenant or COMMON)
            if len(self._whose) > DIGESTS_MAX:
                self._whose.popitem(last=False)

    def end(self, namespace: str, rows: Iterable[tuple[str | None, list[int]]]) -> None:
        """A worker has gone; its ring's rows stay counted."""
        self._add(self._ended, namespace, rows)

    def totals(
        self, opened: Iterable[tuple[str, Iterable[tuple[str | None, list[int]]]]]
    ) -> dict[Owner, list[int]]:
        """Each owner's totals, in the order of TENANT_COUNTERS.

        Args:
            opened: of each attached worker its namespace and its ring's rows.
        """
        totals = {owner: list(counts) for owner, counts in self._ended.items()}
        for namespace, rows in opened:
            self._add(totals, namespace, rows)
        return totals

    def _add(
        self,
        totals: dict[Owner, list[int]],
        namespace: str,
        rows: Iterable[tuple[str | None, list[int]]],
    ) -> None:
        for tenant, counts in rows:
            if any(counts):
                owner = self._owner(namespace, OTHER if tenant is None else tenant or COMMON)
                before = totals.get(owner)
                totals[owner] = counts if before is None else list(map(add, before, counts))

    def _owner(self, namespace: str, tenant: str) -> Owner:
        known = self._owners.get((namespace, tenant))
        if known is not None:
            return known
        if namespace not in self._namespaces and len(self._namespaces) > NAMESPACES_MAX:
            return Owner(OTHER, OTHER)
        if tenant != OTHER and (len(self._owners) >= ACCOUNTS_MAX or not tenant.isprintable()):
            return self._owner(namespace, OTHER)
        self._namespaces.add(namespace)
        self._owners[namespace, tenant] = owner = Owner(namespace, tenant)
        return owner

    def held(self, blocks: Blocks, now_s: float) -> dict[Owner, dict[str, int]]:
        """Copies that each owner has, by tier, as of a moment ago; see HELD_S.

        Blocks on flash belong to nobody that is known after a restart, until their tenant's next
        prompt is stored; they are OTHER's.
        """
        if now_s >= self._held_until_s:
            self._held_until_s = now_s + HELD_S * len(blocks.spaces)
            self._held = {}
            nobody = Owner(OTHER, OTHER)
            for space, digest in blocks.spaces.items():
                names = self._whose.get(digest)
                owner = nobody if names is None else self._known(*names)
                mine = self._held.setdefault(owner, dict.fromkeys(blocks.copies, 0))
                for tier, copies in blocks.copies.items():
                    mine[tier] += copies.get(space, 0)
        return self._held

    def _known(self, namespace: str, tenant: str) -> Owner:
        """Of one that holds blocks; it gets no account by that alone."""
        known = self._owners.get((namespace, tenant))
        return known or self._owners.get((namespace, OTHER)) or Owner(OTHER, OTHER)


def tenant_uses(
    totals: Mapping[Owner, list[int]], held: Mapping[Owner, Mapping[str, int]]
) -> tuple[TenantUse, ...]:
    """The accounts, who asked for most first."""
    nothing = [0] * len(TENANT_COUNTERS)
    owners = {**totals, **dict.fromkeys(held)}
    uses = [_use(owner, totals.get(owner, nothing), held.get(owner, {})) for owner in owners]
    return tuple(sorted(uses, key=lambda use: -use.requested_tokens))


def _use(owner: Owner, counts: list[int], held: Mapping[str, int]) -> TenantUse:
    words = dict(zip(TENANT_COUNTERS, counts, strict=True))
    hits = {tier: words[f"hit_tokens.{tier}"] for tier in TIERS}
    misses = {why: words[f"miss_tokens.{why}"] for why in MISS_REASONS}
    saved_s = {tier: words[f"saved_us.{tier}"] / MICRO for tier in TIERS}
    load_s = {tier: words[f"load_us.{tier}"] / MICRO for tier in MOVED_TIERS}
    store_s = words["store_us"] / MICRO
    return TenantUse(
        namespace=owner.namespace,
        tenant=owner.tenant,
        lookups=words["lookups"],
        # Not the worker's own word for it: a worker adds to its words one after the other, and a
        # reading may come in between.
        requested_tokens=sum(hits.values()) + sum(misses.values()),
        hit_tokens=hits,
        miss_tokens=misses,
        saved_s=saved_s,
        load_s=load_s,
        load_bytes={tier: words[f"load_bytes.{tier}"] for tier in MOVED_TIERS},
        store_s=store_s,
        stored_blocks=words["stored_blocks"],
        net_s=worth_s(sum(saved_s[tier] for tier in MOVED_TIERS), sum(load_s.values()), store_s),
        held_blocks={tier: held.get(tier, 0) for tier in MOVED_TIERS},
    )


def worth_of_tiers(uses: Iterable[TenantUse], written_s: float) -> tuple[Worth, ...]:
    """What each tier is worth to all tenants together.

    Args:
        written_s: that the sidecar took to write to flash.
    """
    uses = tuple(uses)
    worths = []
    for tier in TIERS:
        tokens = sum(use.hit_tokens[tier] for use in uses)
        saved_s = sum(use.saved_s[tier] for use in uses)
        load_s = sum(use.load_s.get(tier, 0.0) for use in uses)
        stored = {"dram": sum(use.store_s for use in uses), "flash": written_s}
        store_s = stored.get(tier, 0.0)
        net_s = worth_s(saved_s, load_s, store_s)
        worths.append(Worth(tier, tokens, saved_s, load_s, store_s, net_s))
    return tuple(worths)
