"""docs/metrics.md, made from the lists of metrics: `python -m kvist.engine.metric_page FILE`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from kvist.cachesvc.core.accounts import ACCOUNTS_MAX, COMMON, NAMESPACES_MAX, OTHER
from kvist.cachesvc.view import definitions as sidecar
from kvist.cachesvc.worker.tenants import FIRST_COME, SHARE_MIN, TOKENS_MIN
from kvist.engine import definitions as engine
from kvist.proto.metrics import Definition, as_table
from kvist.proto.shm import TENANT_ROWS

_INTRODUCTION = f"""# Metrics

Made by `python -m kvist.engine.metric_page docs/metrics.md` from the two lists in the code
(`cachesvc/view/definitions.py`, `engine/definitions.py`), from which `/metrics` is made too; a
test keeps this page fresh.

## One definition

    requested tokens = hit(tier) + miss(reason)

Every prompt token of every request that asks the cache is counted once, when the request is
admitted: as a hit of the tier in which its block was when the request came, or as a miss with the
reason for which it had to be computed ([what the reasons mean](architecture.md#miss-reasons)). A
request that bypasses the cache (`kv_cache: bypass`) is not counted; one that was preempted is not
counted again. The counts of a worker are running totals in its ring file, which nothing drops:
not a full ring, not a dead worker, and while the sidecar is away the worker keeps them. They end
with the life of the sidecar.

The same tokens are in the usage of each answer (`prompt_tokens_details`), in the engine's
`/metrics`, in the sidecar's `/metrics` and `/stats.json`, and in `kvist cache stats`; a test
holds them against each other, per tenant too.

## Tenants

Labels are bounded. `namespace` is the model's name and 8 digits of the digest of what makes its
KV interchangeable, {NAMESPACES_MAX} of them at most; `tenant` is the name in a request's salt
(`acme:secret` is `acme`, a bare salt a hash of it), `{COMMON}` without a salt, and `{OTHER}` for
all that have no account of their own. A worker gives the first {FIRST_COME} tenants an account,
and later ones when they have had {TOKENS_MIN:,} tokens and {SHARE_MIN:.0%} of all,
{TENANT_ROWS - 1} in all; the sidecar shows {ACCOUNTS_MAX} pairs of namespace and tenant at most.
An account stays, and what was counted for `{OTHER}` stays there, so every total only grows and
the sum is exact at any time.

## Is it worth it

    worth = seconds saved - seconds of loads - seconds of stores

Saved is the prefill that was not computed: `a * tokens + b * sum of positions` of a request's
hits, with the `a` and `b` that its engine had measured by then; what was hit before it had
measured a prefill of 32 tokens is valued when it has (the last 256 requests). Loads count from
when a thread takes them up to verified blocks, and for flash also how long the request was passed
over while its blocks rose. Stores are workers' copies into DRAM, calls included, and writes to
flash. All copying counts, that beside a computation too, so the worth is rather more than what is
shown. The worth of the sidecar, to all or to one tenant, is that of its own tiers, DRAM and flash:
hits in an engine's HBM would be there without it, so they have a line of their own and are in no
sum. What the sidecar's own threads took to write to flash is in the whole and no tenant's. The one
place of the formula is `worth_s` in `cachesvc/core/accounts.py`.

`kvist_load_estimate_ratio` and `kvist_prefill_estimate_ratio` say how good the estimates are by
which an engine decides whether to load or to compute: what came over what was expected, 1 is
right.

"""

_SIDECAR = """## The sidecar

`kvistd` serves `/metrics` and `/stats.json` at `http_listen`. A figure is a path into
`/stats.json`: `tiers[tier].slots` is the field `slots` of each item of `tiers`, whose own `tier`
is the label. Histograms are its `histograms` of that name. The calls and the version stand beside
the store's figures. What workers measure (look-ups, loads, stores, estimates) they tell twice a
second, through words of their ring files, without a call. What KV events are is in
[events.md](events.md).

"""

_ENGINE = """## The engine

`kvist serve` has `/metrics` on its own port. Those that begin with `vllm:` mean what they mean in
vLLM and have the labels `engine` and `model_name` too, so that dashboards and routers made for
vLLM work unchanged. There is also `vllm:cache_config_info`: a gauge of 1 with the pool's size as
labels. Histograms are kept in the API process; a figure is a field of `CoreStats`
(`engine/request.py`) or follows from one (`engine/definitions.figures_of`). Under vLLM itself the
plugin's metrics begin with `vllm:kvist_`; see [vllm.md](vllm.md).

"""


def page() -> str:
    """The page's text."""
    return (
        _INTRODUCTION + _SIDECAR + _tables(sidecar.GROUPS) + "\n" + _ENGINE + _tables(engine.GROUPS)
    )


def _tables(groups: Mapping[str, tuple[Definition, ...]]) -> str:
    parts = [f"### {title}\n\n" + "\n".join(as_table(group)) for title, group in groups.items()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
