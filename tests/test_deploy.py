"""What is in deploy/ fits the programs: flags are there, paths, ports and sizes agree."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from sim.sidecar import KVISTD

from kvist.cachesvc.config import SidecarConfig, add_flags, load_config
from kvist.engine.config import add_serve_flags
from kvist.proto.sizes import parse_bytes

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "kvistd.service"
TOML = DEPLOY / "systemd" / "kvistd.toml"
GIB = 1 << 30


def config_of(*flags: str) -> SidecarConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_config(parser.parse_args(flags), {}, Path("/none")).config


def within(path: Path | None, folder: str) -> bool:
    return path is not None and PurePosixPath(path).is_relative_to(folder)


@pytest.fixture(scope="module")
def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/kvist/bin/kvistd", str(KVISTD)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr


def test_the_unit_makes_the_folders_that_its_settings_name(unit: dict[str, str]) -> None:
    program, flag, file = unit["ExecStart"].split()
    assert (program, flag, file) == ("/opt/kvist/bin/kvistd", "--config", "/etc/kvist/kvistd.toml")
    config = config_of("--config", str(TOML))
    run, state = f"/run/{unit['RuntimeDirectory']}", f"/var/lib/{unit['StateDirectory']}"
    assert within(config.socket, run)
    assert within(config.run_dir, run)
    assert within(config.shm_dir, "/dev/shm")
    assert within(config.flash_path, state)
    assert unit["RuntimeDirectoryMode"] == unit["StateDirectoryMode"] == "0700"


def test_the_example_file_says_nothing_that_is_the_default_anyway() -> None:
    said = tomllib.loads(TOML.read_text())
    default = config_of()
    same = {
        key
        for key in said
        if getattr(config_of("--config", str(TOML)), key) == getattr(default, key)
    }
    # Paths depend on who runs it, and a scraper has to know the port.
    assert same <= {"socket", "run_dir", "shm_dir", "http_listen"}


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(
        (DEPLOY / "kubernetes" / "kvistd-sidecar.yaml").read_text()
    )
    assert parsed["kind"] == "Pod"
    return dict(parsed["spec"])


@pytest.fixture(scope="module")
def sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["initContainers"]
    assert container["command"] == ["kvistd"]
    assert container["restartPolicy"] == "Always"
    return dict(container)


@pytest.fixture(scope="module")
def engine(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["containers"]
    assert container["command"][:2] == ["kvist", "serve"]
    return dict(container)


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}


def serve_flags(engine: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser)
    return parser.parse_args([*engine["command"][2:], *engine["args"]])


def test_every_path_of_the_pod_is_in_a_volume_and_shared_ones_are_the_same(
    pod: dict[str, Any], sidecar: dict[str, Any], engine: dict[str, Any]
) -> None:
    config, serve = config_of(*sidecar["args"]), serve_flags(engine)
    assert serve.cache == str(config.socket)
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {*mounts(sidecar).values(), *mounts(engine).values()} == volumes
    for shared in (config.socket, config.run_dir, config.shm_dir):
        [folder] = [path for path in mounts(sidecar) if within(shared, path)]
        assert mounts(engine)[folder] == mounts(sidecar)[folder]
    assert any(within(config.flash_path, path) for path in mounts(sidecar))
    assert any(within(Path(serve.model), path) for path in mounts(engine))
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"]
    assert not {"runAsUser", "runAsGroup"} & {
        *sidecar["securityContext"],
        *engine["securityContext"],
    }


def test_ports_of_the_pod_are_those_that_are_listened_on_and_probed(
    sidecar: dict[str, Any], engine: dict[str, Any]
) -> None:
    config, serve = config_of(*sidecar["args"]), serve_flags(engine)
    listens = (
        (sidecar, config.http_listen, "/healthz"),
        (engine, f"{serve.host}:{serve.port}", "/health"),
    )
    for container, address, health in listens:
        host, _, port = address.rpartition(":")
        assert host == "0.0.0.0", "a probe comes from outside the pod's loopback"
        [named] = container["ports"]
        assert named["containerPort"] == int(port)
        probes = [value for key, value in container.items() if key.endswith("Probe")]
        assert probes
        for probe in probes:
            assert probe["httpGet"] == {"path": health, "port": named["name"]}


def test_memory_of_the_pod_holds_what_the_sidecar_is_told_to_keep(
    pod: dict[str, Any], sidecar: dict[str, Any]
) -> None:
    config = config_of(*sidecar["args"])
    [shm] = [
        one["emptyDir"] for one in pod["volumes"] if one["name"] == mounts(sidecar)["/dev/shm"]
    ]
    limit = parse_bytes(sidecar["resources"]["limits"]["memory"] + "B")
    assert shm["medium"] == "Memory"
    # The arena, then index and rings, then the process.
    assert config.dram_bytes + GIB <= parse_bytes(shm["sizeLimit"] + "B") <= limit - GIB
    assert sidecar["resources"]["requests"]["memory"] == sidecar["resources"]["limits"]["memory"]


def test_provisioning_reads_boards_as_they_are_written() -> None:
    file = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "kvist.yaml").read_text())
    [provider] = file["providers"]
    assert provider["options"]["path"] in (DEPLOY / "README.md").read_text()
    uids = [json.loads(board.read_text())["uid"] for board in (DEPLOY / "grafana/boards").iterdir()]
    assert len(set(uids)) == len(uids) == 4


def test_the_readme_has_every_file_for_operators_and_its_links_hold() -> None:
    text = (DEPLOY / "README.md").read_text()
    links = {(DEPLOY / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", text)}
    assert all(link.exists() for link in links), links
    for file in DEPLOY.rglob("*"):
        if file.suffix in (".yml", ".yaml", ".service", ".toml", ".json"):
            assert links & {file, *file.parents}, file
