"""Settings of kvistd: where they come from, what is refused and what the message says."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvist.cachesvc import config as settings
from kvist.cachesvc.config import SETTINGS, Loaded, add_flags, as_toml, load_config
from kvist.cachesvc.core.space import check_space
from kvist.proto.errors import ConfigInvalid


def load(
    *flags: str, environment: Mapping[str, str] | None = None, file: Path = Path("/nowhere")
) -> Loaded:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_config(parser.parse_args(flags), environment or {}, file)


def write(folder: Path, text: str) -> Path:
    path = folder / "kvistd.toml"
    path.write_text(text)
    return path


def test_defaults_are_complete_and_valid() -> None:
    loaded = load()
    assert loaded.config.dram_bytes == 1 << 30
    assert loaded.config.flash_path is None
    assert loaded.config.slot_bytes is None
    assert set(loaded.sources.values()) == {"default"}


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'dram_bytes = "1MiB"\nio_threads = 3\nlog_level = "error"\n')
    environment = {"KVIST_DRAM_BYTES": "2MiB", "KVIST_IO_THREADS": "4"}
    loaded = load("--dram-bytes", "3MiB", environment=environment, file=file)
    assert loaded.config.dram_bytes == 3 << 20
    assert loaded.config.io_threads == 4
    assert loaded.config.log_level == "error"
    assert loaded.sources["dram_bytes"] == "flag --dram-bytes"
    assert loaded.sources["io_threads"] == "environment KVIST_IO_THREADS"
    assert loaded.sources["log_level"] == f"file {file}"
    assert loaded.sources["socket"] == "default"


def test_printed_settings_are_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    first = load("--flash-path", '/data/a b\\c"d', "--reservation-share", "0.5")
    file = write(tmp_path, as_toml(first))
    assert load("--config", str(file)).config == first.config
    assert "# flag --flash-path" in as_toml(first)
    assert list(tomllib.loads(as_toml(first))) == [setting.key for setting in SETTINGS]


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("dram_bytes", "lots", "4GiB"),
        ("dram_bytes", "1KiB", "1MiB or more"),
        ("slot_bytes", "10000", "multiple of 4KiB"),
        ("run_dir", "relative/path", "absolute"),
        ("socket", "/" + "x" * 120, "shorter"),
        ("http_listen", "9401", "host:port"),
        ("listen", "0.0.0.0:99999", "host:port"),
        ("io_threads", "0", "1 to 64"),
        ("io_threads", "-1", "1 to 64"),
        ("reservation_share", "1.5", "like 0.25"),
        ("log_level", "loud", "debug, info"),
    ],
)
def test_wrong_value_is_refused_with_key_source_and_fix(key: str, value: str, hint: str) -> None:
    name = f"KVIST_{key.upper()}"
    with pytest.raises(ConfigInvalid, match=f"^{key} .from environment {name}.*{hint}"):
        load(environment={name: value})


def test_unknown_key_in_the_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, 'dram_byts = "1MiB"\n')
    with pytest.raises(ConfigInvalid, match=r"dram_byts .*did you mean dram_bytes"):
        load(file=file)


def test_unknown_variable_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigInvalid, match="did you mean KVIST_FLASH_PATH"):
        load(environment={"KVIST_FLASH_PAHT": "/x"})


def test_variables_of_other_programs_are_let_alone() -> None:
    foreign = {
        "KVIST_API_KEY": "k",
        "KVIST_SERVICE_HOST": "10.0.0.1",
        "KVIST_PORT_9400_TCP_ADDR": "10.0.0.1",
        "KVIST_SIDECAR_SERVICE_PORT_GRPC": "9400",
        "PATH": "/bin",
    }
    assert load(environment=foreign).config == load().config


def test_broken_missing_and_nested_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot read"):
        load("--config", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigInvalid, match="not TOML"):
        load(file=write(tmp_path, "dram_bytes ="))
    with pytest.raises(ConfigInvalid, match="string or a number"):
        load(file=write(tmp_path, "io_threads = true"))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="slot_bytes: 4MiB is more than dram_bytes"):
        load("--slot-bytes", "4MiB", "--dram-bytes", "2MiB")
    with pytest.raises(ConfigInvalid, match="another port"):
        load("--listen", "127.0.0.1:9401")


def test_every_setting_has_a_field_and_help() -> None:
    assert {s.key for s in SETTINGS} == {f.name for f in settings.fields(settings.SidecarConfig)}
    assert all(setting.help.endswith(".") for setting in SETTINGS)


def test_too_little_room_names_setting_folder_and_fix(tmp_path: Path) -> None:
    folders = ("--run-dir", str(tmp_path / "run"), "--shm-dir", str(tmp_path / "shm"))
    check_space(load(*folders).config)
    with pytest.raises(ConfigInvalid, match=r"dram_bytes: 9000TiB do not fit into .*shm_dir"):
        check_space(load(*folders, "--dram-bytes", "9000TiB").config)


def test_folder_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match=r"run_dir: cannot use .*/file/run"):
        check_space(load("--run-dir", str(tmp_path / "file" / "run")).config)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("io_threads = " + "9" * 5000, "is not TOML"),
        ("io_threads = " + "[" * 5000, "is not TOML"),
        (f'dram_bytes = "{"9" * 400}GiB"', "dram_bytes"),
        ('socket = "/tmp/\\u007f"', "socket"),
        ('run_dir = "/tmp/\\u0000"', "run_dir"),
    ],
    ids=["digits", "brackets", "endless", "control", "zero"],
)
def test_what_python_cannot_take_is_refused_as_any_wrong_setting(
    tmp_path: Path, text: str, hint: str
) -> None:
    with pytest.raises(ConfigInvalid, match=hint):
        load("--config", str(write(tmp_path, text)))
