"""`kvist cache verify`: checks a flash directory while nothing runs, and says what it found."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from kvist.cachesvc.tools.progress import Bar
from kvist.cachesvc.tools.words import counted
from kvist.proto.errors import FormatRefused
from kvist.proto.sizes import format_bytes
from kvist.tiers.flash_check import FlashReport, check_directory
from kvist.tiers.segment import CLEAR_COMMAND

EXIT_SOUND, EXIT_PROBLEMS = 0, 1


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache verify`."""
    parser.add_argument("path", metavar="PATH", help="the folder: flash_path of a kvistd")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_verify(flags: argparse.Namespace) -> int:
    """Check and print.

    Returns:
        0 when all that the index lists is sound and to be found, else 1.

    Raises:
        ConfigInvalid: it is no flash folder, or a process uses it.
    """
    path = Path(flags.path)
    bar, looked_at = Bar(sys.stderr, "slots"), (0, 0)

    def show(done: int, total: int) -> None:
        nonlocal looked_at
        looked_at = done, total
        bar.show(done, total)

    try:
        report = check_directory(path, show)
    except KeyboardInterrupt:
        bar.clear()
        print(f"interrupted after {looked_at[0]} of {looked_at[1]} slots", file=sys.stderr)
        raise
    except (FormatRefused, OSError) as error:
        if flags.json:
            print(json.dumps({"path": str(path), "problems": [str(error)], "problem_count": 1}))
        else:
            print(error, file=sys.stderr)
        return EXIT_PROBLEMS
    finally:
        bar.clear()
    print(json.dumps(asdict(report)) if flags.json else as_text(report))
    return EXIT_PROBLEMS if report.problem_count else EXIT_SOUND


def as_text(report: FlashReport) -> str:
    """The report for people."""
    shown = {verdict.replace("_", " "): count for verdict, count in report.records.items() if count}
    records = ", ".join(f"{count} {verdict}" for verdict, count in shown.items()) or "none"
    lines = [
        f"{report.path}: format {report.version}, {report.segments} segments,"
        f" {report.slots} slots of {format_bytes(report.slot_bytes)}",
        f"  records  {records}",
        f"  index    {report.index}, {counted(report.entries, 'block')}: "
        f"{report.listed_bad} damaged,"
        f" {report.listed_elsewhere} not where it says, {report.orphans} without the block before",
        f"  besides  {report.unlisted} sound records that are not listed (evicted, or of a write"
        " that was cut short)",
    ]
    lines += [f"  problem  {problem}" for problem in report.problems]
    unsaid = report.problem_count - len(report.problems)
    if unsaid:
        lines.append(f"  problem  and {unsaid} more")
    if report.problem_count:
        lines.append(
            f"{report.problem_count} problems. kvistd drops what is damaged when it meets it, and"
            f" serves none of it; to begin anew: {CLEAR_COMMAND}"
        )
    else:
        lines.append("sound: every block that the index lists is whole and in its place")
    return "\n".join(lines)
