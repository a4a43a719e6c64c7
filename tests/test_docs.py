"""The documentation: generated pages are fresh, links lead somewhere, every command works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sim.models import tiny_llama
from sim.reader import NO_NETWORK, blocks_of

from kvist.cachesvc.config import SETTINGS
from kvist.engine.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    Path("README.md"),
    *sorted(page.relative_to(ROOT) for page in (ROOT / "docs").glob("*.md")),
]
WRITTEN = [
    page
    for page in PAGES
    if page.name not in ("api.md", "cli.md", "configuration.md", "formats.md")
]
_COMMANDS = ("kvist", "kvistd", "make", "pip", "curl", "python", "mkdir", "docker", "kubectl")
# Pages about other engines, whose commands need these: make test-vllm, test-sglang, test-lmcache.
ELSEWHERE = ["docs/lmcache.md", "docs/sglang.md", "docs/vllm.md"]
# Pages that one person reads in one go, with one set of servers.
SESSIONS = [
    ["README.md"],
    ["docs/quickstart.md", "docs/operating.md"],
    ["docs/events.md", "docs/tracing.md", "docs/logging.md"],
]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "docs" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (ROOT / page).parent / name if name else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if f"({page.name})" not in listed]
    assert [name for name in missing if name != "README.md"] == []


@pytest.mark.parametrize("page", WRITTEN, ids=str)
def test_blocks_with_commands_are_marked_as_such(page: Path) -> None:
    for block in blocks_of(ROOT / page):
        first = block.text.split(maxsplit=1)[0] if block.text.split() else ""
        assert block.language or first not in _COMMANDS, f"line {block.line}: write ```sh"


def inline_commands() -> list[tuple[str, str]]:
    """Commands of Kvist that stand in the middle of a text: page, command."""
    found = []
    for page in WRITTEN:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        starts = ("kvist ", "kvistd ", "python benchmarks/")
        found += [
            (str(page), span)
            for span in spans
            if span.startswith(starts) and not span.startswith("kvist under ")  # a log line
        ]
    return found


@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_commands_in_texts_can_be_typed(page: str, command: str) -> None:
    words = shlex.split(command.replace("|", " ").replace("...", ""))
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "python":
        text = (ROOT / words[1]).read_text()
        assert all(f'"{flag}"' in text for flag in flags), f"{page}: {command}"
    elif words[0] == "kvistd":
        known = {setting.flag for setting in SETTINGS}
        assert flags <= known | {"--print-config", "--clear-flash", "--help", "--version"}
    else:
        parser = build_parser()
        for word in words[1:]:
            kinds = [a for a in parser._actions if isinstance(a.choices, dict)]
            if not kinds or word not in (kinds[0].choices or {}):
                break
            parser = kinds[0].choices[word]  # type: ignore[index,call-overload]
        else:
            word = ""
        named = {option for action in parser._actions for option in action.option_strings}
        assert flags <= named, f"{page}: {command}"
        assert not kinds or not word or word.startswith("-") or word.isupper(), f"{page}: {command}"


@pytest.mark.parametrize("pages", SESSIONS, ids=" ".join)
def test_commands_of_a_page_work_one_after_the_other(pages: list[str], tmp_path: Path) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    model = tiny_llama(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests/sim/reader.py"), str(desk), str(model), *pages],
        capture_output=True,
        text=True,
    )
    if done.returncode == NO_NETWORK:
        pytest.skip("this kernel gives no network of one's own")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ELSEWHERE)
def test_commands_for_another_engine_name_what_there_is(page: str) -> None:
    """Flags of kvistd and what the JSON names; the commands as a whole need the other engine."""
    known = {setting.flag for setting in SETTINGS}
    configs = 0
    for block in (block for block in blocks_of(ROOT / page) if block.language == "sh"):
        for command in block.commands:
            words = shlex.split(command.removesuffix("&"))
            if words[0] == "kvistd":
                assert {word for word in words if word.startswith("--")} <= known
            for config in (json.loads(word) for word in words if word.startswith("{")):
                if module := config.get("kv_connector_module_path", config.get("module_path", "")):
                    configs += 1
                    path = ROOT / module.removeprefix("kvist.").replace(".", "/")
                    assert path.is_dir() or path.with_suffix(".py").is_file(), module
    assert configs, "the page shows no configuration that loads the plugin"


def test_no_page_with_commands_is_left_out() -> None:
    followed = {page for pages in SESSIONS for page in pages}
    for page in WRITTEN:
        if any(block.language == "sh" for block in blocks_of(ROOT / page)):
            assert str(page) in followed | set(ELSEWHERE), page
