"""`kvist cache ...` and `kvist top` as subcommands; the tools are in kvist.cachesvc.tools."""

from __future__ import annotations

from kvist.cachesvc.study.replay_flags import add_replay_flags
from kvist.cachesvc.tools.doctor.examine import add_doctor_flags
from kvist.cachesvc.tools.dropping import (
    add_clear_flags,
    add_evict_flags,
    add_pin_flags,
    add_unpin_flags,
    run_clear,
    run_evict,
    run_pin,
    run_unpin,
)
from kvist.cachesvc.tools.listing import add_ls_flags, add_show_flags, run_ls, run_show
from kvist.cachesvc.tools.top.flags import add_top_flags
from kvist.cachesvc.tools.verifying import add_verify_flags, run_verify
from kvist.cachesvc.tools.warming import add_warm_flags, run_warm
from kvist.cachesvc.view.stats_table import add_stats_flags, run_stats
from kvist.engine.commands import Command, Group, later

_TOOLS = "kvist.cachesvc.tools"

CACHE = Group(
    "cache",
    "look at a cache, change what it holds, or ask what one would do",
    (
        Command(
            "stats",
            "what a running kvistd holds and serves, and from which length loading pays",
            add_stats_flags,
            run_stats,
        ),
        Command("ls", "which prefixes are stored, the most used first", add_ls_flags, run_ls),
        Command(
            "show",
            "all about one block; exit code 1 when it is not there or a copy is damaged",
            add_show_flags,
            run_show,
        ),
        Command(
            "pin",
            "have the blocks of a prompt go later than others, for a while",
            add_pin_flags,
            run_pin,
        ),
        Command("unpin", "end the pins of a prompt's blocks", add_unpin_flags, run_unpin),
        Command("evict", "drop a block from every tier", add_evict_flags, run_evict),
        Command("clear", "drop all, or all of a namespace or a tenant", add_clear_flags, run_clear),
        Command(
            "warm",
            "have prompts computed, or raised from flash, before anybody waits for them",
            add_warm_flags,
            run_warm,
        ),
        Command(
            "verify",
            "check a flash folder that no kvistd uses; exit code 1 when something is wrong",
            add_verify_flags,
            run_verify,
        ),
        Command(
            "replay",
            "what a cache of some size would hit on a trace of requests",
            add_replay_flags,
            later("kvist.cachesvc.study.replay_table", "run_replay"),
        ),
        Command(
            "doctor",
            "check this host, and a running kvistd, and say what to change; exit code 1 when "
            "something is bad",
            add_doctor_flags,
            later(f"{_TOOLS}.doctor.examine", "run_doctor"),
        ),
    ),
)
TOP = Command(
    "top", "a live view of a running kvistd", add_top_flags, later(f"{_TOOLS}.top.live", "run_top")
)
