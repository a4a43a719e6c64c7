"""kvistd as a process: its start, its stop, its command line, its page."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sim.sidecar import KVISTD, Prompt, Sidecar, load_all, wait_until

from kvist.cachesvc.config import SETTINGS
from kvist.cachesvc.folders import home_folders
from kvist.cachesvc.log import BURST_LINES, Log

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "transformers"):
            raise AssertionError(f"kvistd imports {name}")
sys.meta_path.insert(0, Refuse())
from kvist.cachesvc.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path, ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"])
    made.start()
    yield made
    made.close()


def kvistd(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVIST_")}
    return subprocess.run(
        [str(KVISTD), *flags],
        env={**environment, **variables, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_starts_without_torch_and_says_where_everything_is(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, program=(sys.executable, "-P", "-c", WITHOUT_TORCH))
    sidecar.start()
    try:
        assert sidecar.said("socket") == str(sidecar.socket)
        assert sidecar.said("page").startswith("http://127.0.0.1:")
        assert sidecar.said("metrics") == sidecar.said("page") + "metrics"
        assert sidecar.client().store(Prompt(1, 2).items).stored == 2
        print(f"ready {sidecar.said('start_ms')} ms after the process began")
    finally:
        sidecar.close()


def test_clean_stop_writes_what_was_stored_and_removes_its_files(sidecar: Sidecar) -> None:
    prompt = Prompt(2, 20)
    sidecar.client().store(prompt.items)
    assert sidecar.stop() == 0
    assert not sidecar.socket.exists()
    assert not list((sidecar.folder / "shm").iterdir())
    assert {path.name for path in (sidecar.folder / "run").iterdir()} <= {"store.lock"}
    sidecar.start()
    client = sidecar.clients[0]
    wait_until(lambda: client.reattaches == 1 and client.state == "attached", "the client")
    assert client.tiers(prompt.keys) == ("flash",) * 20
    client.prefetch(prompt.keys, 20)
    assert load_all(client, prompt) == [None] * 20


def test_start_after_a_kill_takes_the_place_of_the_dead(sidecar: Sidecar) -> None:
    sidecar.client().store(Prompt(3, 4).items)
    sidecar.kill()
    assert len(list((sidecar.folder / "shm").iterdir())) == 1
    sidecar.start()
    assert len(list((sidecar.folder / "shm").iterdir())) == 1
    client = sidecar.clients[0]
    wait_until(lambda: client.reattaches == 1 and client.state == "attached", "the client")
    assert client.store(Prompt(4, 4).items).stored == 4


def test_second_sidecar_on_the_same_folders_is_refused(sidecar: Sidecar) -> None:
    done = kvistd(
        *("--socket", str(sidecar.folder / "b.sock"), "--run-dir", str(sidecar.folder / "run")),
        *("--shm-dir", str(sidecar.folder / "shm"), "--dram-bytes", "8MiB"),
    )
    assert done.returncode == 2
    assert "another sidecar uses" in done.stderr


def test_taken_port_is_refused_with_the_setting(sidecar: Sidecar, tmp_path: Path) -> None:
    address = sidecar.said("page").removeprefix("http://").rstrip("/")
    other = tmp_path / "other"
    done = kvistd(
        *("--socket", str(other / "b.sock"), "--run-dir", str(other)),
        *("--shm-dir", str(other), "--dram-bytes", "8MiB", "--http-listen", address),
    )
    assert done.returncode == 2, done.stderr
    assert f"http_listen: cannot listen on {address}" in done.stderr


def test_wrong_settings_end_with_code_2_and_one_line() -> None:
    for flags, variables, hint in (
        (("--dram-bytes", "lots"), {}, "dram_bytes (from flag --dram-bytes)"),
        ((), {"KVIST_DRAM_BYTE": "1GiB"}, "did you mean KVIST_DRAM_BYTES?"),
        (("--clear-flash",), {}, "flash_path: not set"),
    ):
        done = kvistd(*flags, **variables)
        assert done.returncode == 2
        assert hint in done.stderr
        assert done.stderr.count("\n") == 1


def test_part_of_a_flags_name_is_no_flag() -> None:
    done = kvistd("--flash-byte", "3", "--print-config")
    assert (done.returncode, "unrecognized arguments: --flash-byte" in done.stderr) == (2, True)


def test_print_config_shows_every_setting_with_its_source() -> None:
    done = kvistd("--print-config", "--io-threads", "3", KVIST_LOG_LEVEL="debug")
    assert done.returncode == 0
    assert 'io_threads = "3"  # flag --io-threads' in done.stdout
    assert 'log_level = "debug"  # environment KVIST_LOG_LEVEL' in done.stdout
    assert all(f"\n{setting.key} = " in done.stdout for setting in SETTINGS)


def test_clear_flash_removes_only_its_own_files_and_only_when_nobody_uses_them(
    sidecar: Sidecar,
) -> None:
    flash = sidecar.folder / "flash"
    sidecar.client().store(Prompt(5, 2).items)
    flags = ("--clear-flash", "--flash-path", str(flash))
    in_use = kvistd(*flags)
    assert in_use.returncode == 2
    assert "in use" in in_use.stderr
    sidecar.stop()
    (flash / "notes.txt").write_text("mine")
    assert kvistd(*flags).returncode == 0
    again = kvistd(*flags)
    assert (again.returncode, "not a flash folder of kvistd" in again.stderr) == (2, True)
    assert {path.name for path in flash.iterdir()} <= {"notes.txt", "owner.lock", "wear.json"}


def test_page_metrics_stats_and_health_answer(sidecar: Sidecar) -> None:
    client = sidecar.client()
    client.store(Prompt(6, 3).items)
    client.count(100, {"dram": 60}, {"tail": 40})
    wait_until(
        lambda: json.loads(sidecar.get("stats.json"))["requested_tokens"] == 100, "the counts"
    )
    assert "<title>Kvist</title>" in sidecar.get("")
    assert sidecar.get("healthz") == "ok\n"
    stats = json.loads(sidecar.get("stats.json"))
    assert stats["hit_tokens"]["dram"] == 60
    assert [tier["tier"] for tier in stats["tiers"]] == ["dram", "flash"]
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(sidecar.get("metrics"))
        for sample in family.samples
    }
    assert samples["kvist_requested_tokens_total",] == 100
    assert samples["kvist_hit_tokens_total", "dram"] == 60
    assert samples["kvist_miss_tokens_total", "tail"] == 40
    assert samples["kvist_tier_used_slots", "dram"] == 3


def test_unknown_page_and_other_methods_are_refused(sidecar: Sidecar) -> None:
    for request, code in (
        (urllib.request.Request(sidecar.said("page") + "nope"), 404),
        (urllib.request.Request(sidecar.said("page") + "../dashboard.py"), 404),
        (urllib.request.Request(sidecar.said("page") + "history.json?step=7"), 400),
        (urllib.request.Request(sidecar.said("page") + "history.json?since=soon"), 400),
        (urllib.request.Request(sidecar.said("page"), data=b"x", method="POST"), 405),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5.0)
        assert caught.value.code == code
        caught.value.close()


def test_log_writes_one_line_an_event_in_both_forms() -> None:
    text, lines = io.StringIO(), io.StringIO()
    Log(text, wall=lambda: 0.0).info("worker gone", path="/a b", n=1, empty="", text="x\ny")
    want = '1970-01-01T00:00:00.000+00:00 INFO    worker gone path="/a b" n=1 empty="" text="x\\ny"'
    assert text.getvalue() == want + "\n"
    Log(lines, format="json", wall=lambda: 0.0).error("flash failed", path=Path("/x"))
    assert json.loads(lines.getvalue()) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "error",
        "event": "flash failed",
        "path": "/x",
    }


def test_log_limits_an_event_and_says_how_many_it_dropped() -> None:
    now = 0.0
    stream = io.StringIO()
    log = Log(stream, wall=lambda: 0.0, now=lambda: now)
    for _ in range(BURST_LINES + 7):
        log.info("again")
    log.info("other")
    log.debug("below the level")
    assert stream.getvalue().count("again") == BURST_LINES
    assert stream.getvalue().count("other") == 1
    assert "below" not in stream.getvalue()
    now = 11.0
    log.info("again")
    assert stream.getvalue().splitlines()[-1].endswith("again similar_dropped=7")


def test_a_running_sidecars_socket_is_not_taken_from_it(sidecar: Sidecar, tmp_path: Path) -> None:
    other = tmp_path / "other"
    second = kvistd(
        f"--socket={sidecar.socket}", f"--run-dir={other}", f"--shm-dir={other}",
        "--http-listen=", "--dram-bytes=1MiB",
    )  # fmt: skip
    assert second.returncode == 2
    assert "another sidecar listens on" in second.stderr
    assert sidecar.socket.is_socket()


def test_a_file_in_place_of_the_socket_is_refused_and_kept(tmp_path: Path) -> None:
    there = tmp_path / "file"
    there.write_text("mine")
    refused = kvistd(
        f"--socket={there}", f"--run-dir={tmp_path}", f"--shm-dir={tmp_path}", "--http-listen=",
        "--dram-bytes=1MiB",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "is no socket" in refused.stderr
    assert there.read_text() == "mine"


def test_each_user_has_folders_of_his_own_when_nothing_is_said() -> None:
    assert home_folders(0, {}) == ("/run/kvist", "/dev/shm/kvist")
    runtime = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert home_folders(7, runtime) == ("/run/user/7/kvist", "/dev/shm/kvist-7")
    assert home_folders(7, {}) == ("/tmp/kvist-7", "/dev/shm/kvist-7")
