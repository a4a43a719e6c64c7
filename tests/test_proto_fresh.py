"""The checked-in code of the wire format is what its .proto says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("cache_pb2.py", "cache_pb2.pyi", "cache_pb2_grpc.py", "cache_pb2_grpc.pyi")


def test_generated_code_is_what_the_proto_file_gives(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    pytest.importorskip("mypy_protobuf", reason="mypy-protobuf is not installed")
    (tmp_path / "in" / "kvist").mkdir(parents=True)
    (tmp_path / "in" / "kvist" / "proto").symlink_to(ROOT / "proto")
    out = tmp_path / "out"
    out.mkdir()
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    # The plug-ins of mypy-protobuf are scripts beside the interpreter.
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "grpc_tools.protoc", "-I", str(tmp_path / "in")),
            *(f"--{kind}_out={out}" for kind in kinds),
            "kvist/proto/cache.proto",
        ],
        env=path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in GENERATED:
        fresh = (out / "kvist" / "proto" / name).read_text()
        assert fresh == (ROOT / "proto" / name).read_text(), f"{name} is stale: make it anew"
