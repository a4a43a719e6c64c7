"""`kvist cache verify`: finds every damage, complains of nothing else, changes no byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from sim.blocks import SLOT_BYTES, make_block
from sim.disk import FaultyDisk
from sim.flash import SLOTS, filled, flip, open_tier

from kvist.engine.cli import main
from kvist.tiers.flash_check import FlashReport, check_directory

HEADER_BYTES = make_block(0).header.shape.header_bytes


def check(path: Path) -> FlashReport:
    return check_directory(path, lambda _done, _total: None)


def fingerprint(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "owner.lock"
    }


def said(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = main(["cache", "verify", str(path), *flags])
    return code, capsys.readouterr().out


def test_a_sound_folder_is_sound_and_untouched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, blocks=8)
    before, seen = fingerprint(tmp_path), []
    report = check_directory(tmp_path, lambda done, total: seen.append((done, total)))
    assert (report.problem_count, report.index, report.entries, report.unlisted) == (
        0,
        "whole",
        8,
        0,
    )
    assert {verdict: n for verdict, n in report.records.items() if n} == {
        "sound": 8, "empty": SLOTS - 8,
    }  # fmt: skip
    assert seen == [(done, SLOTS) for done in range(1, SLOTS + 1)]
    code, out = said(tmp_path, capsys)
    assert code == 0
    assert out.splitlines()[-1].startswith("sound:")
    code, out = said(tmp_path, capsys, "--json")
    assert code == 0
    assert json.loads(out)["records"]["sound"] == 8
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [
        (HEADER_BYTES + 100, "bad_payload"),
        (60, "bad_header"),
        (10, "bad_header"),
        (130, "bad_header"),
    ],
)
def test_a_flipped_byte_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offset: int, verdict: str
) -> None:
    stored = filled(tmp_path)
    slot = sorted(stored)[3]
    flip(tmp_path / "segment-00000", slot * SLOT_BYTES + offset)
    report = check(tmp_path)
    assert (report.listed_bad, report.records[verdict]) == (1, 1)
    assert report.problems == [
        f"block {stored[slot].header.key.hex()} in slot {slot}: {verdict.replace('_', ' ')}"
    ]
    code, out = said(tmp_path, capsys)
    assert code == 1
    assert report.problems[0] in out
    assert "kvistd --clear-flash" in out


def test_another_version_of_a_record_is_told_apart_from_damage(tmp_path: Path) -> None:
    slot = min(filled(tmp_path))
    with (tmp_path / "segment-00000").open("r+b") as file:
        file.seek(slot * SLOT_BYTES + 16)
        file.write(b"\x63")
    assert check(tmp_path).records["other_version"] == 1


def test_swapped_slots_are_not_where_the_index_says(tmp_path: Path) -> None:
    one, two = sorted(filled(tmp_path))[:2]
    with (tmp_path / "segment-00000").open("r+b") as file:
        records = []
        for slot in (one, two):
            file.seek(slot * SLOT_BYTES)
            records.append(file.read(SLOT_BYTES))
        for slot, record in zip((two, one), records, strict=True):
            file.seek(slot * SLOT_BYTES)
            file.write(record)
    report = check(tmp_path)
    assert (report.listed_elsewhere, report.problem_count, report.records["sound"]) == (2, 2, 8)


def test_a_cut_segment_has_entries_without_a_slot(tmp_path: Path) -> None:
    filled(tmp_path)
    os.truncate(tmp_path / "segment-00000", 5 * SLOT_BYTES)
    report = check(tmp_path)
    assert (report.slots, report.listed_elsewhere, report.entries) == (5, 3, 8)


def test_what_is_not_listed_is_no_problem_and_an_orphan_is(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    tier = open_tier(tmp_path)
    keys = [block.header.key for block in stored.values()]
    tier.index_delete([keys[-1]])
    tier.close()
    report = check(tmp_path)
    assert (report.unlisted, report.problem_count) == (1, 0)
    tier = open_tier(tmp_path)
    tier.index_delete([keys[2]])
    tier.close()
    report = check(tmp_path)
    assert (report.unlisted, report.orphans, report.problem_count) == (2, 1, 1)


@pytest.mark.parametrize("how", ["missing", "damaged", "rebuilding"])
def test_an_index_that_is_not_whole_is_a_problem(tmp_path: Path, how: str) -> None:
    filled(tmp_path)
    if how == "damaged":
        (tmp_path / "index.mdb").write_bytes(b"x" * 20000)
    elif how == "missing":
        (tmp_path / "index.mdb").unlink()
    else:
        (tmp_path / "index.mdb").rename(tmp_path / "index.new")
    report = check(tmp_path)
    assert (report.index, report.problem_count, report.unlisted) == (how, 1, 8)


def test_a_device_that_fails_gives_unreadable_slots(tmp_path: Path) -> None:
    filled(tmp_path)
    disk = FaultyDisk()
    disk.broken["pread"] = errno.EIO
    report = check_directory(tmp_path, lambda _done, _total: None, disk)
    assert (report.records["unreadable"], report.listed_bad) == (SLOTS, 8)


def test_no_more_than_a_few_problems_are_told_but_all_are_counted(tmp_path: Path) -> None:
    filled(tmp_path, blocks=SLOTS)
    with (tmp_path / "segment-00000").open("r+b") as file:
        file.write(bytes(SLOTS * SLOT_BYTES))
    report = check(tmp_path)
    assert (report.problem_count, len(report.problems)) == (SLOTS, 20)


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["cache", "verify", *argv])
    return code, capsys.readouterr().err


def test_a_folder_in_use_or_of_nobody_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = open_tier(tmp_path / "flash")
    code, text = refused([str(tmp_path / "flash")], capsys)
    assert (code, f"in use by process {os.getpid()}; stop it first" in text) == (2, True)
    tier.close()
    for path, reason in ((tmp_path, "not a flash folder"), (tmp_path / "none", "does not exist")):
        code, text = refused([str(path)], capsys)
        assert (code, reason in text) == (2, True)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "owner.lock").exists()


def test_an_unknown_version_is_refused_with_the_command_that_clears_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    with (tmp_path / "superblock").open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")
    code, text = refused([str(tmp_path)], capsys)
    assert (code, "format version 99" in text, "kvistd --clear-flash" in text) == (1, True, True)
    assert main(["cache", "verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problem_count"] == 1
