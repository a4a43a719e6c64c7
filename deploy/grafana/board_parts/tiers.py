"""Board "Cache tiers": is the cache healthy, does it hit, why not, what is where, what moves."""

from __future__ import annotations

from board_parts.board import (
    BAD_OVER_0,
    GOOD_OVER_0,
    NAMESPACE,
    SIDECAR,
    SIDECAR_JOB,
    TENANT,
    TIER,
    Board,
    Panel,
)
from board_parts.metrics import heat, quantile, quantiles

STATES = {
    1: ("ready", "green"),
    2: ("rebuilding", "yellow"),
    3: ("failed", "red"),
    4: ("off", "#808080"),
}
_STATE = " + ".join(
    f'{number} * max by (instance, tier) (kvist_tier_state{{state="{name}"}})'
    for number, (name, _) in STATES.items()
)

HEALTHY = (
    Panel(
        "stat", "Sidecars", {"": "count(kvist_uptime_seconds)"},
        "Sidecars that answered the last scrape.", steps=GOOD_OVER_0, width=3, height=4,
    ),
    Panel(
        "stat", "Workers attached", {"": "sum(kvist_sessions)"},
        "Engines that read and write the cache now. Fewer than engines run: the others compute "
        "everything.", width=3, height=4,
    ),
    Panel(
        "stat", "Restarts", {"": "sum(resets(kvist_uptime_seconds[RANGE]))"},
        "Times that a sidecar began anew in the board's range. Each costs what was in DRAM.",
        steps=((None, "green"), (1, "yellow"), (3, "red")), width=3, height=4,
    ),
    Panel(
        "stat", "Blocks damaged", {"": "sum(increase(kvist_corrupt_blocks_total[RANGE]))"},
        "Copies whose checksum, tokens or namespace were wrong. They were dropped and computed "
        "again, no answer was wrong; but memory or disk should not do this.",
        steps=BAD_OVER_0, width=3, height=4,
    ),
    Panel(
        "stat", "Slots in quarantine", {"": "sum(kvist_tier_quarantined_slots)"},
        "Places that gave wrong bytes and are left alone until the sidecar starts anew.",
        steps=BAD_OVER_0, width=3, height=4,
    ),
    Panel(
        "states", "Tiers", {"{{instance}} {{tier}}": _STATE},
        "Failed: the tier is off, its hits are misses, and it is tried again by itself.",
        names=STATES, width=7, height=4,
    ),
    Panel(
        "stat", "Release", {"{{version}}": "count by (version) (kvist_build_info)"},
        "Sidecars of each; two of them during an upgrade.", width=2, height=4,
    ),
)  # fmt: skip

HITS = (
    Panel(
        "stat", "Hit rate",
        {"": "sum(increase(kvist_hit_tokens_total[RANGE]))"
             " / sum(increase(kvist_requested_tokens_total[RANGE]))"},
        "Share of the prompt tokens that were found in the chosen tiers, in the board's range.",
        "percentunit", width=4,
    ),
    Panel(
        "share", "Where prompt tokens came from",
        {"{{tier}}": "sum by (tier) (rate(kvist_hit_tokens_total[W]))"
                     " / on () group_left () sum(rate(kvist_requested_tokens_total[W]))",
         "computed": "sum(rate(kvist_miss_tokens_total[W]))"
                     " / sum(rate(kvist_requested_tokens_total[W]))"},
        "Requested is hits and misses, so with all tiers chosen the colours fill the height.",
        "percentunit", width=10, high=1,
    ),
    Panel(
        "stack", "Prompt tokens a second",
        {"{{tier}}": "sum by (tier) (rate(kvist_hit_tokens_total[W]))",
         "computed": "sum(rate(kvist_miss_tokens_total[W]))"},
        "The same as amounts.", width=10,
    ),
    Panel(
        "lines", "Hit rate by tenant",
        {"{{namespace}} {{tenant}}":
         "sum by (namespace, tenant) (rate(kvist_tenant_hit_tokens_total[W]))"
         " / sum by (namespace, tenant) (rate(kvist_tenant_requested_tokens_total[W]))"},
        "A tenant without hits has prompts that do not repeat, or too small a quota.",
        "percentunit", width=12, high=1,
    ),
    Panel(
        "lines", "Requests a second by tenant",
        {"{{namespace}} {{tenant}}":
         "sum by (namespace, tenant) (rate(kvist_tenant_lookups_total[W]))"},
        "Who asks.", "reqps", width=12,
    ),
)  # fmt: skip

MISSES = (
    Panel(
        "stack", "Tokens computed, by reason",
        {"{{reason}}": "sum by (reason) (rate(kvist_miss_tokens_total[W]))"},
        "never_stored is new text. evicted asks for more memory: see the what-if curve. "
        "not_admitted: flash takes what comes back, within its budget. cheaper: loading would have "
        "taken longer. docs/architecture.md, Miss reasons, has all of them.", width=12,
    ),
    Panel(
        "stack", "Blocks that workers offered, by outcome",
        {"{{outcome}}": "sum by (outcome) (rate(kvist_offered_blocks_total[W]))"},
        "full: nothing could go, all is in use or pinned. share: one worker holds its share of "
        "reservations. no_parent: the block before it is not there.", width=12,
    ),
    Panel(
        "stack", "Tokens computed, by tenant and reason",
        {"{{namespace}} {{tenant}} {{reason}}":
         "sum by (namespace, tenant, reason) (rate(kvist_tenant_miss_tokens_total[W])) > 0"},
        "Choose a tenant above. One whose reason is evicted wants a floor, one that makes others' "
        "evicted a quota.", width=12,
    ),
    Panel(
        "lines", "Reads whose check failed",
        {"{{reason}}": "sum by (reason) (rate(kvist_failed_reads_total[W]))"},
        "torn: the slot was given to another block while it was read, which is normal under "
        "pressure. corrupt is not.", width=12,
    ),
    Panel(
        "lines", "Blocks that went otherwise than by eviction",
        {"expired": "sum(rate(kvist_expired_total[W]))",
         "refused: {{reason}}": "sum by (reason) (rate(kvist_refused_blocks_total[W]))"},
        "expired: a tenant's ttl. refused: at the commit, by the index, or without the block "
        "before it.", width=12,
    ),
    Panel(
        "lines", "Wishes for flash that came to nothing",
        {"sink {{reason}}": "sum by (reason) (rate(kvist_sink_dropped_total[W]))",
         "rise {{reason}}": "sum by (reason) (rate(kvist_rise_dropped_total[W]))"},
        "first_use is the admission at work. budget: the day's writes are used up. no_room: the "
        "queue is full, the disk is too slow. device: it fails.", width=12,
    ),
)  # fmt: skip

WHERE = (
    Panel(
        "lines", "Slots in use",
        {"{{tier}}": "sum by (tier) (kvist_tier_used_slots) / sum by (tier) (kvist_tier_slots)"},
        "A full tier is normal; it matters what is evicted, and how long it had lain.",
        "percentunit", high=1,
    ),
    Panel(
        "lines", "Bytes in use",
        {"{{tier}}": "sum by (tier) (kvist_tier_used_slots * kvist_tier_slot_bytes)"},
        "Whole slots.", "bytes",
    ),
    Panel(
        "stack", "Blocks held, by tenant",
        {"{{namespace}} {{tenant}} {{tier}}":
         "sum by (namespace, tenant, tier) (kvist_tenant_held_blocks)"},
        "Who has the room; quotas and floors are in `tenants` of kvistd.",
    ),
    Panel(
        "lines", "Evicted blocks a second",
        {"{{tier}}": "sum by (tier) (rate(kvist_evicted_blocks_total[W]))"},
        "A block that leaves DRAM may be on flash still.",
    ),
    Panel(
        "lines", "Age of a block when evicted, median",
        {"{{tier}}: since its last use":
         quantile(0.5, "kvist_block_idle_before_evict_seconds", "tier"),
         "{{tier}}: since it was stored": quantile(0.5, "kvist_block_lifetime_seconds", "tier")},
        "If the time since its last use is shorter than the time between two uses, beside it, the "
        "tier is too small.", "s",
    ),
    Panel(
        "heat", "Time between two uses of a block", heat("kvist_block_reuse_gap_seconds"),
        "What is above the time since the last use at eviction would be hits in a larger tier.",
        "s",
    ),
    Panel(
        "lines", "Blocks held and pinned",
        {"held": "sum(kvist_blocks)", "pinned": "sum(kvist_pinned_blocks)",
         "reserved": "sum(kvist_reserved_slots)"},
        "Reserved slots are being filled by a worker; they stay for milliseconds.",
    ),
    Panel(
        "lines", "Points of hit rate over leaf-LRU",
        {"{{instance}} {{tier}}": "max by (instance, tier) (kvist_eviction_points_over_lru)"},
        "What the eviction policy wins, or loses, against the base line counted beside it.",
        low=None,
    ),
    Panel(
        "lines", "Hit rate of a tier of another size",
        {"{{tier}} x {{multiple}}": "avg by (tier, multiple) (kvist_what_if_hit_ratio)"},
        "x 1 is the present size. A flat fan: memory is not what is lacking.",
        "percentunit", high=1,
    ),
)  # fmt: skip

MOVES = (
    Panel(
        "lines", "Bytes between workers and DRAM",
        {"loads": "sum(rate(kvist_loaded_bytes_total[W]))",
         "stores": "sum(rate(kvist_stored_bytes_total[W]))"},
        "Copied by workers themselves, without a call.", "Bps",
    ),
    Panel(
        "lines", "Bytes to and from flash",
        {"read": 'sum(rate(kvist_read_bytes_total{tier="flash"}[W]))',
         "written": 'sum(rate(kvist_written_bytes_total{tier="flash"}[W]))'},
        "Whole slots.", "Bps",
    ),
    Panel(
        "lines", "Rate of the disk while it works",
        {"read": 'sum(rate(kvist_read_bytes_total{tier="flash"}[W]))'
                 ' / sum(rate(kvist_flash_busy_seconds_total{way="read"}[W]))',
         "write": 'sum(rate(kvist_written_bytes_total{tier="flash"}[W]))'
                  ' / sum(rate(kvist_flash_busy_seconds_total{way="write"}[W]))'},
        "Bytes over the time that one thread took for them; `kvist cache doctor` measures the "
        "disk alone.", "Bps",
    ),
    Panel("lines", "A look-up takes", quantiles("kvist_lookup_seconds"),
          "In the worker, without a call; tens of microseconds.", "s"),
    Panel("lines", "A load takes", quantiles("kvist_load_seconds", "tier"),
          "A request's blocks, by the slowest tier they were in, the wait included.", "s"),
    Panel("lines", "A store takes", quantiles("kvist_store_seconds"),
          "A batch of blocks, beside the computation.", "s"),
    Panel("lines", "A rise from flash takes", quantiles("kvist_rise_seconds"),
          "Of one block, from when it was queued.", "s"),
    Panel("lines", "A sink to flash takes", quantiles("kvist_sink_seconds"),
          "Of one block, from when it was queued to when it is in the index of flash.", "s"),
    Panel("lines", "Waits for a thread of flash", quantiles("kvist_flash_queue_seconds", "way"),
          "If this is most of a rise, give more io_threads or a faster disk.", "s"),
    Panel(
        "lines", "Blocks queued for flash",
        {"{{way}}": "sum by (way) (kvist_flash_queued_blocks)"},
        "Reads go first. Writes over flash_queue_blocks are dropped and counted.",
    ),
)  # fmt: skip

FLASH = (
    Panel(
        "lines", "Write budget left",
        {"{{instance}}": "sum by (instance) (kvist_flash_budget_left_bytes)"},
        "Empty without flash_write_bytes_per_day. At 0 nothing is written until it fills.",
        "bytes",
    ),
    Panel(
        "lines", "Written to flash, as bytes a day",
        {"written": "86400 * sum(rate(kvist_flash_wear_bytes_total[W]))",
         "budget": "sum(kvist_flash_budget_bytes_per_day)"},
        "Compare it with the disk's rated writes.", "bytes",
    ),
    Panel(
        "lines", "Blocks admitted to flash, and not",
        {"admitted": "sum(rate(kvist_sink_admitted_total[W]))",
         "not {{reason}}": "sum by (reason) (rate(kvist_sink_dropped_total[W]))"},
        "Admission takes what comes back; the rest would only wear the disk.",
    ),
)  # fmt: skip

ROUTERS = (
    Panel(
        "lines", "Blocks told to routers",
        {"{{event}} {{medium}}":
         "sum by (event, medium) (rate(kvist_kv_event_blocks_total[W]))"},
        "Empty where KV events are off, as all of this row. CPU is DRAM, STORAGE flash.",
    ),
    Panel(
        "lines", "Changes not told yet",
        {"{{instance}}": "sum by (instance) (kvist_kv_event_pending)"},
        "Told every 5 ms; if this stays high, routers send prompts to where their blocks were.",
    ),
    Panel(
        "lines", "Routers that asked again",
        {"{{kind}}": "sum by (kind) (increase(kvist_kv_event_answers_total[W]))",
         "told that all is gone": "sum(increase(kvist_kv_event_clears_total[W]))"},
        "A router asks at its start and when it has missed a message; one that asks all the time "
        "is too slow or loses messages.",
    ),
)  # fmt: skip

SERVICE = (
    Panel(
        "lines", "Calls a second",
        {"{{method}}": "sum by (method) (rate(kvist_packet_calls_total[W]))",
         "{{method}} (gRPC)": "sum by (method) (rate(kvist_grpc_calls_total[W]))"},
        "Look-ups and loads make none.", "ops",
    ),
    Panel(
        "lines", "Reports of workers that were dropped",
        {"dropped": "sum(rate(kvist_ring_drops_total[W]))"},
        "A full ring drops touches, never counts: eviction knows a little less.",
    ),
    Panel(
        "lines", "Sessions opened",
        {"{{instance}}": "sum by (instance) (increase(kvist_sessions_opened_total[W]))"},
        "Workers that attach again and again are restarting, or lose the sidecar.",
    ),
)  # fmt: skip

BOARD = Board(
    "kvist-cache-tiers",
    "Cache tiers",
    "Is the cache healthy, does it hit, why not, what is where, and what moves.",
    (SIDECAR_JOB, SIDECAR, NAMESPACE, TENANT, TIER),
    {
        "Is it healthy?": HEALTHY,
        "Does it hit?": HITS,
        "Why not?": MISSES,
        "What is where?": WHERE,
        "What moves, and how fast?": MOVES,
        "Flash": FLASH,
        "Routers (KV events)": ROUTERS,
        "The service": SERVICE,
    },
)
