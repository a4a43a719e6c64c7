"""The house rules, as tests: format, lint, types, import contracts, sizes."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "tiers", "transfer", "kernels", "cachesvc", "engine")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 50
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
BIN = Path(sys.executable).parent


def sources(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not GENERATED.search(path.name)
    ]


PRODUCT = sources(*ROOMS)
EVERYTHING = PRODUCT + sources("tests", "benchmarks", "docs", "deploy")


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def namespace() -> Path:
    """Static tools do not run import hooks, so they get a tree of links: kvist/<room>."""
    links = ROOT / "build" / "ns" / "kvist"
    links.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        link = links / room
        if not link.is_symlink():
            link.symlink_to(Path("../../..") / room)
    return links.parent


def run(*command: str | Path, **env: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_code_is_formatted() -> None:
    run(BIN / "ruff", "format", "--check", ".")


def test_linter_has_nothing_to_say() -> None:
    run(BIN / "ruff", "check", ".")


def test_types_are_strict_and_hold(namespace: Path) -> None:
    run(sys.executable, "-m", "mypy", "-p", "kvist", MYPYPATH=str(namespace))


def test_scripts_are_typed(namespace: Path) -> None:
    files = [ident(path) for path in sources("benchmarks", "docs", "deploy")]
    run(sys.executable, "-m", "mypy", *files, MYPYPATH=str(namespace))


def test_imports_keep_the_contracts() -> None:
    run(BIN / "lint-imports", "--no-cache")


def test_bare_room_names_are_not_importable() -> None:
    found = [room for room in ROOMS if importlib.util.find_spec(room) is not None]
    assert not found, f"{found} importable: run pytest as `pytest` with PYTHONSAFEPATH=1"


def test_every_package_is_shipped() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        "kvist." + str(init.parent.relative_to(ROOT)).replace("/", ".")
        for room in ROOMS
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert there == set(listed["packages"]) == set(listed["package-dir"])


@pytest.mark.parametrize("path", EVERYTHING, ids=ident)
def test_file_says_what_lives_there_and_fits_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(('"""', "#!")), "the first line says what lives here"
    assert ast.get_docstring(ast.parse(text)), "the first line says what lives here"
    assert text.count("\n") <= FILE_LINES_MAX


@pytest.mark.parametrize("path", PRODUCT + sources("benchmarks", "docs", "deploy"), ids=ident)
def test_functions_fit_on_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


def test_no_committed_file_names_a_path_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    pattern = re.compile(r"/(work|home|Users)/[a-z]")
    bad = [
        name
        for name in listed.stdout.split()
        if (ROOT / name).suffix
        in {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".html", ".sh", ""}
        and (ROOT / name).is_file()
        and pattern.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert not bad
