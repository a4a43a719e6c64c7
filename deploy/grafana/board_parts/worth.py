"""Board "Is it worth it": seconds saved and spent by tier and tenant, and what more would bring."""

from __future__ import annotations

from board_parts.board import NAMESPACE, SIDECAR, SIDECAR_JOB, TENANT, TIER, Board, Panel
from board_parts.metrics import quantiles

NOTE = """\
`worth = seconds saved - seconds of loads - seconds of stores`. Saved is the prefill that hits did
not take, by the rates that the engines measured; all copying counts as spent, that beside a
computation too, so the worth is rather more. HBM's hits cost nothing and an engine has them
without Kvist; DRAM and flash are what the sidecar adds. Defined in docs/metrics.md."""
_BELOW = '{tier!="hbm"}'
_ACCOUNT = "sum by (namespace, tenant)"
_ANSWER = ((None, "red"), (0, "green"))
_ESTIMATES = "between 0.8 and 1.25 the estimates by which it is decided are good."


def _net(rise: str, window: str, only: str = "", by: str = "") -> str:
    """Saved less spent: a second (rate), or in all (increase)."""
    total = f"sum by ({by})" if by else "sum"
    saved, load, store = (
        f"{total} ({rise}(kvist_worth_{what}_seconds_total{only}[{window}]))"
        for what in ("saved", "load", "store")
    )
    return f"{saved} - {load} - {store}"


def _near(histogram: str) -> str:
    """Share of what a histogram of ratios counted between 0.8 and 1.25."""
    low, high = (f'sum(rate({histogram}_bucket{{le="{at}"}}[W]))' for at in ("0.8", "1.25"))
    return f"({high} - {low}) / sum(rate({histogram}_count[W]))"


def _first_token(share: float) -> str:
    """By the tier that most came from, whichever tiers are chosen: they are to be compared."""
    buckets = 'rate(kvist_ttft_seconds_bucket{tier=~".+"}[W])'
    return f"histogram_quantile({share}, sum by (le, tier) ({buckets}))"


ANSWER = (
    Panel("stat", "Worth of DRAM and flash", {"": _net("increase", "RANGE", _BELOW)},
          "Seconds of prefill won in the board's range, after what it took. Negative: turn it "
          "off, or find out why below.", "s", steps=_ANSWER, width=4, height=5),
    Panel("stat", "Engines that this replaces", {"": _net("rate", "RANGE", _BELOW)},
          "Seconds won a second: so many engines would do nothing but compute what was found.",
          "none", steps=_ANSWER, width=4, height=5),
    Panel("stat", "Saved by DRAM and flash",
          {"": f"sum(increase(kvist_worth_saved_seconds_total{_BELOW}[RANGE]))"},
          "Prefill that was not computed.", "s", width=3, height=5),
    Panel("stat", "Spent on it",
          {"": f"sum(increase(kvist_worth_load_seconds_total{_BELOW}[RANGE]))"
               f" + sum(increase(kvist_worth_store_seconds_total{_BELOW}[RANGE]))"},
          "Loads, stores, and writes to flash.", "s",
          width=3, height=5),
    Panel("stat", "Saved by HBM",
          {"": 'sum(increase(kvist_worth_saved_seconds_total{tier="hbm"}[RANGE]))'},
          "Engines have this without a sidecar.", "s", width=3, height=5),
    Panel("text", "", text=NOTE, width=7, height=5),
)  # fmt: skip

TIERS = (
    Panel("lines", "Won a second, by tier", {"{{tier}}": _net("rate", "W", by="tier")},
          "Seconds a second. DRAM pays the stores of all, flash its own writes and waits.",
          "none", low=None, steps=((None, "red"), (0, "green"))),
    Panel("lines", "Saved and spent, all chosen tiers",
          {"saved": "sum(rate(kvist_worth_saved_seconds_total[W]))",
           "loads": "sum(rate(kvist_worth_load_seconds_total[W]))",
           "stores": "sum(rate(kvist_worth_store_seconds_total[W]))"},
          "Stores that never become hits are lost: admission and tenants' quotas are for that.",
          "none"),
    Panel("lines", "Worth since the sidecar began",
          {"{{tier}}": "sum by (tier) (kvist_worth_net_seconds)"},
          "It begins at 0 with each life of a sidecar.", "s", low=None),
)  # fmt: skip

TENANTS = (
    Panel("table", "Tenants, in the board's range",
          {"requested tokens":
           f"{_ACCOUNT} (increase(kvist_tenant_requested_tokens_total[RANGE]))",
           "hit rate":
           f"{_ACCOUNT} (increase(kvist_tenant_hit_tokens_total[RANGE]))"
           f" / {_ACCOUNT} (increase(kvist_tenant_requested_tokens_total[RANGE]))",
           "saved": f"{_ACCOUNT} (increase(kvist_tenant_saved_seconds_total[RANGE]))",
           "loads": f"{_ACCOUNT} (increase(kvist_tenant_load_seconds_total[RANGE]))",
           "stores": f"{_ACCOUNT} (increase(kvist_tenant_store_seconds_total[RANGE]))",
           "loaded": f"{_ACCOUNT} (increase(kvist_tenant_load_bytes_total[RANGE]))",
           "stored blocks": f"{_ACCOUNT} (increase(kvist_tenant_stored_blocks_total[RANGE]))",
           "held blocks": f"{_ACCOUNT} (kvist_tenant_held_blocks)"},
          "Who saves, and who only stores. The flash's writes are no tenant's.",
          names={"hit rate": "percentunit", "saved": "s", "loads": "s", "stores": "s",
                 "loaded": "bytes"}, width=14, height=9),
    Panel("lines", "Worth by tenant, since the sidecar began",
          {"{{namespace}} {{tenant}}": f"{_ACCOUNT} (kvist_tenant_net_seconds)"},
          "Below 0 for long: its prompts do not come back; give it a small quota.", "s", low=None,
          width=10, height=9),
)  # fmt: skip

USERS = (
    Panel("lines", "Time to first token, median",
          {"{{tier}}": _first_token(0.5)},
          "What users have of it: none is requests of whose prompt less than half was cached.",
          "s", width=12),
    Panel("lines", "Time to first token, p99",
          {"{{tier}}": _first_token(0.99)},
          "A tier slower than none is one that should not be loaded from.", "s", width=12),
)  # fmt: skip

MORE = (
    Panel("bars", "DRAM of another size would hit",
          {"x {{multiple}}": 'avg by (multiple) (kvist_what_if_hit_ratio{tier="dram"})'},
          "Share of blocks asked for, by leaf-LRU, in 0.5 to 8 times the present size. If x 2 "
          "brings less than a point or two, memory is not what you lack.", "percentunit", high=1,
          width=6),
    Panel("bars", "Flash of another size would hit",
          {"x {{multiple}}": 'avg by (multiple) (kvist_what_if_hit_ratio{tier="flash"})'},
          "Of all blocks asked for, those that DRAM would hit as well.", "percentunit", high=1,
          width=6),
    Panel("lines", "What twice the size would bring",
          {"{{tier}}": 'avg by (tier) (kvist_what_if_hit_ratio{multiple="2"})'
                       ' - avg by (tier) (kvist_what_if_hit_ratio{multiple="1"})'},
          "Points of block hit rate.", "percentunit", width=6),
    Panel("lines", "And what half would cost",
          {"{{tier}}": 'avg by (tier) (kvist_what_if_hit_ratio{multiple="1"})'
                       ' - avg by (tier) (kvist_what_if_hit_ratio{multiple="0.5"})'},
          "Near 0: the memory is better given to something else.", "percentunit", width=6),
)  # fmt: skip

DECISIONS = (
    Panel("stack", "What was done with what was found",
          {"{{decision}}": "sum by (decision) (rate(kvist_load_decisions_total[W]))"},
          "load all, a part, or compute as that is cheaper.", "reqps"),
    Panel("lines", "Loads: came over expected", quantiles("kvist_load_estimate_ratio"),
          f"1 is right; {_ESTIMATES}", "none"),
    Panel("lines", "Good estimates",
          {"loads": _near("kvist_load_estimate_ratio"),
           "prefill": _near("kvist_prefill_estimate_ratio")},
          f"Share of them; {_ESTIMATES}", "percentunit", high=1),
    Panel("lines", "Prefill: came over expected", quantiles("kvist_prefill_estimate_ratio"),
          f"1 is right; {_ESTIMATES}", "none"),
    Panel("lines", "Bytes moved for a second saved",
          {"loaded": "sum(rate(kvist_loaded_bytes_total[W]))"
                     f" / sum(rate(kvist_worth_saved_seconds_total{_BELOW}[W]))",
           "written to flash": "sum(rate(kvist_flash_wear_bytes_total[W]))"
                     ' / sum(rate(kvist_worth_saved_seconds_total{tier="flash"}[W]))'},
          "What the disk wears for.", "bytes"),
    Panel("lines", "Written to flash in all lives of the folder",
          {"{{instance}}": "sum by (instance) (kvist_flash_folder_wear_bytes)"},
          "Its slope against the disk's rated writes is its life.", "bytes"),
)  # fmt: skip

BOARD = Board(
    "kvist-is-it-worth-it",
    "Is it worth it",
    "Seconds of prefill saved and spent, by tier and tenant, and what more memory would bring.",
    (SIDECAR_JOB, SIDECAR, NAMESPACE, TENANT, TIER),
    {
        "Is it?": ANSWER,
        "Which tier pays?": TIERS,
        "Do users notice?": USERS,
        "Which tenant?": TENANTS,
        "Would more memory?": MORE,
        "Are the decisions good?": DECISIONS,
    },
)
