"""The page in a real browser, over a real sidecar with real traffic: it says what /metrics says."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sim.sidecar import BLOCK_TOKENS, Prompt, Sidecar, namespace, wait_until

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.worker.meter import Meter
from kvist.engine.cli import main
from kvist.engine.local import free_port
from kvist.proto.keys import tenant_of
from kvist.proto.record import Bytes

pytest.importorskip("selenium", reason="needs selenium, which the dev extra brings")
from sim.browser import MISSING, Browser

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TAIL = 5
PREFILL = 100.0  # tokens a second: what is saved is far more than what a busy machine moves in
SHOWN = "return document.querySelectorAll('#sources-rows tr').length === 5"


def start(folder: Path, *flags: str) -> Sidecar:
    """A kvistd on a port that it has again after a restart."""
    made = Sidecar(folder, ["--http-listen", f"127.0.0.1:{free_port()}", *flags])
    made.start()
    return made


class Chats:
    """Prompts of one tenant: looked up, loaded, stored, counted and measured as an engine does."""

    def __init__(self, client: CacheClient, salt: str) -> None:
        self.client, self.space, self.tenant = client, namespace(salt), tenant_of(salt)
        self.meter = Meter()

    def ask(self, seed: int, blocks: int) -> None:
        """One request."""
        prompt, client = Prompt(seed, blocks, self.space), self.client
        found = client.lookup(prompt.keys)
        tiers = client.tiers(prompt.keys)[: found.blocks]
        client.touch(prompt.keys, found.blocks)
        client.prefetch(prompt.keys, found.blocks)
        out: Bytes = np.empty(self.space.format.payload_bytes, np.uint8)
        for wanted in prompt.wanted[: found.blocks]:
            assert client.load(wanted, out, time.monotonic() + 5.0) is None
        items = [replace(item, tenant="" if item.depth else self.tenant) for item in prompt.items]
        client.store(items[found.blocks :])
        hits = {tier: BLOCK_TOKENS * blocks for tier, blocks in Counter(tiers).items()}
        missed = BLOCK_TOKENS * (blocks - found.blocks)
        misses = {"tail": TAIL, **({found.reason: missed} if missed else {})}
        client.count(BLOCK_TOKENS * blocks + TAIL, hits, misses, self.tenant)
        for tier, tokens in hits.items():
            self.meter.took(self.tenant, f"saved_us.{tier}", tokens / PREFILL)
            self.meter.took(self.tenant, f"load_us.{tier}", 0.002)
        tier = max(hits, key=lambda each: hits[each]) if hits else "none"
        self.meter.observe(f"ttft_seconds.{tier}", 0.02 if hits else 0.2)
        client.measured(*self.meter.take())


def prompt_of(number: int) -> tuple[int, int]:
    """Seed and blocks of a request's prompt: half of them ask for one of two."""
    seed = number % 28 if number % 4 < 2 else 100
    return seed, 6 + seed % 5


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """One that has had two tenants with several prefixes, more than DRAM holds, and is quiet."""
    folder = tmp_path_factory.mktemp("busy")
    flash = ("--flash-path", str(folder / "flash"), "--flash-bytes", "16MiB")
    made = start(folder, *flash, "--dram-bytes", "1MiB")
    client = made.client("engine-a")
    client.show_rates({"pool_blocks.total": 40, "pool_blocks.filled": 30})
    tenants = [Chats(client, salt) for salt in ("acme:1", "globex:2")]
    for number in range(40):
        tenants[number % 2].ask(*prompt_of(number))
        if number == 20:
            wait_until(lambda: figures(made)["kvist_written_blocks_total", "flash"] > 60, "sinks")
    asked = sum(BLOCK_TOKENS * prompt_of(number)[1] + TAIL for number in range(40))
    wait_until(lambda: figures(made)["kvist_requested_tokens_total",] == asked, "the counts")
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def page(busy: Sidecar, browser: Browser) -> Browser:
    """The busy one's page at 1280, which shows all that was asked for."""
    browser.open(busy.said("page"), 1280)
    asked = int(figures(busy)["kvist_requested_tokens_total",])
    total = "document.querySelector('#sources-rows .total td')?.dataset.tokens"
    browser.wait(f"return {total} === '{asked}'", "the page to show all tokens")
    return browser


def figures(sidecar: Sidecar) -> dict[tuple[str, ...], float]:
    """What /metrics says."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(sidecar.get("metrics"))
        for sample in family.samples
    }


def stats(sidecar: Sidecar) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(sidecar.get("stats.json"))
    return document


def column(browser: Browser, css: str) -> list[int]:
    """Tokens of a sum table, row by row."""
    script = "return [...document.querySelectorAll(arguments[0])].map((td) => +td.dataset.tokens)"
    found: list[int] = browser.run(script, f"{css} td[data-tokens]")
    return found


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def test_tokens_on_the_page_are_those_of_metrics_and_add_up(page: Browser, busy: Sidecar) -> None:
    now = figures(busy)
    hits = [int(now["kvist_hit_tokens_total", tier]) for tier in ("hbm", "dram", "flash")]
    misses = {name[1]: int(n) for name, n in now.items() if name[0] == "kvist_miss_tokens_total"}
    asked = int(now["kvist_requested_tokens_total",])
    assert hits[1] > 0, "DRAM had hits"
    assert hits[2] > 0, "flash had hits"
    assert column(page, "#sources-rows") == [*hits, sum(misses.values()), asked]
    shown = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#misses-rows tr[data-reason]')]"
        ".map((tr) => [tr.dataset.reason, +tr.querySelector('td').dataset.tokens]))"
    )
    assert shown == {reason: tokens for reason, tokens in misses.items() if tokens}
    assert page.text("#hit-start") == percent(sum(hits), asked)


def test_worth_tiers_tenants_and_ttft_are_those_of_the_document(
    page: Browser, busy: Sidecar, capsys: pytest.CaptureFixture[str]
) -> None:
    now = stats(busy)
    worth = {each["tier"]: each for each in now["worth"]}
    net = sum(worth[tier]["net_s"] for tier in ("dram", "flash"))
    assert net > 1
    assert page.text("#worth-net") == f"+{net:.3g} s"
    assert f"{now['spans']['start']['saved_s']:.3g}" in page.text("#worth-saved")
    for tier in now["tiers"]:
        share = percent(tier["used_slots"], tier["slots"]).replace("100.0", "100")
        assert share in page.text(f".tank.{tier['tier']} .of")
    assert percent(30, 40) in page.text(".tank.hbm .of")
    tenants = page.text("#tenants").splitlines()[1:]
    assert {line.split()[0] for line in tenants} == {"acme", "globex"}
    for each in now["tenants"]:
        line = next(line for line in tenants if line.startswith(each["tenant"]))
        assert percent(sum(each["hit_tokens"].values()), each["requested_tokens"]) in line
        assert f"+{each['net_s']:.3g} s" in line
    assert "engine-a" in page.text("#sessions")
    assert page.text("#ttft tr[data-tier=none] b").endswith("ms")
    assert "times sooner" in page.text("#ttft tr[data-tier=dram]")
    assert page.text("#health-words") == now["health"]
    assert main(["top", "--once", "--interval", "0.1", "--socket", str(busy.socket)]) == 0
    told = f"nothing {now['ttft'][0]['mean_s']:.3f} s"
    assert told in capsys.readouterr().out, "one figure, one name: the mean"


def test_the_hottest_prefixes_are_named_by_key_and_never_by_tokens(
    page: Browser, busy: Sidecar
) -> None:
    page.wait("return document.querySelectorAll('#prefixes .key').length > 3", "a round", 15.0)
    shown = page.text("#prefixes").splitlines()
    found = stats(busy)["prefixes"]
    for each in found:
        line = next(line for line in shown if line.startswith(each["key"][:12]))
        assert f"{each['blocks'] * BLOCK_TOKENS} tokens {each['uses']} " in line
    assert found[0]["uses"] > 5
    assert not any(each["begins"] or each["ends"] for each in found)


def test_token_ids_are_shown_where_the_operator_says_so(tmp_path: Path) -> None:
    sidecar = start(tmp_path, "--page-tokens", "shown")
    chats, prompt = Chats(sidecar.client(), ""), Prompt(1, 3)
    for _ in range(3):
        chats.ask(1, 3)
    wait_until(lambda: bool(stats(sidecar)["prefixes"]), "a round")
    (found,) = stats(sidecar)["prefixes"]
    first, last = (np.frombuffer(prompt.items[at].tokens, "<u4").tolist() for at in (0, 2))
    assert (found["begins"], found["ends"]) == (first[:8], last[-8:])
    sidecar.close()


def test_ranges_show_the_same_sums_while_there_is_no_more(page: Browser) -> None:
    before = column(page, "#sources-rows"), column(page, "#misses-rows")
    for name in ("2h", "24h", "10m"):
        page.click(f"#ranges [data-range='{name}']")
        pressed = f"document.querySelector('[data-range=\"{name}\"]').ariaPressed"
        page.wait(f"return {pressed} === 'true'", "the button")
        words = {"2h": "last 10 minutes", "24h": "last hour", "10m": "last"}[name]
        page.wait(
            f"return document.querySelector('.range-words').textContent.includes('{words}')", words
        )
    assert (column(page, "#sources-rows"), column(page, "#misses-rows")) == before


def test_numbers_of_any_size_are_readable(page: Browser) -> None:
    shown = page.run(
        "return import('/format.js').then((f) => ["
        "f.short(0), f.short(999), f.short(12345), f.short(9.99e14), f.count(1234567),"
        "f.percent(0, 0), f.percent(1, 100000), f.percent(99999, 100000), f.percent(5, 5),"
        "f.bytes(0), f.bytes(1536), f.bytes(2 ** 44), f.rate(0), f.rate(0.4), f.rate(2.5e10),"
        "f.duration(0), f.duration(3e-6), f.duration(0.0123), f.duration(-90), f.duration(4000),"
        "f.duration(1e9)])"
    )
    assert shown == [
        "0", "999", "12.3 k", "999 T", "1,234,567",
        "–", "<0.1 %", ">99.9 %", "100 %",
        "0 B", "1.5 KiB", "16 TiB", "0", "<1 B/s", "25 GB/s",
        "0 s", "3 µs", "12.3 ms", "−90 s", "1 h 6 min",
        "11,574 d 1 h",
    ]  # fmt: skip


def test_theme_follows_the_system_and_the_switch_which_is_remembered(
    busy: Sidecar, browser: Browser
) -> None:
    back = "return getComputedStyle(document.body).backgroundColor"
    browser.open(busy.said("page"), 1280, dark=False)
    light = browser.run(back)
    browser.open(busy.said("page"), 1280, dark=True)
    dark = browser.run(back)
    assert dark != light
    browser.click("[data-theme-choice=light]")
    assert browser.run(back) == light
    browser.open(busy.said("page"), 1280, dark=True)
    assert browser.run(back) == light
    browser.click("[data-theme-choice=auto]")
    assert browser.run(back) == dark


def test_charts_have_their_numbers_by_keyboard_and_as_a_table(page: Browser) -> None:
    label = page.run("return document.getElementById('sources-chart').ariaLabel")
    assert "DRAM" in label
    page.press("#sources-chart", "\ue012")  # arrow left
    page.wait("return !!document.querySelector('#sources-chart .tip b')", "a tip")
    page.click("details[data-for=sources-chart] summary")
    cell = "document.querySelectorAll('details[data-for=sources-chart] tbody td:last-child')"
    page.wait(f"return {cell}.length > 0", "the table")
    shown = page.run(f"return [...{cell}].map((td) => +td.textContent.replaceAll(',', ''))")
    assert sum(shown) == column(page, "#sources-rows")[-1]


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_asked_of_others_nothing_complains_and_nothing_sticks_out(
    busy: Sidecar, browser: Browser, width: int
) -> None:
    browser.complaints(), browser.hosts()
    browser.open(busy.said("page"), width)
    browser.wait(SHOWN, "the figures")
    browser.wait("return document.querySelectorAll('.uplot canvas').length === 4", "the charts")
    assert browser.complaints() == []
    assert browser.hosts() == {busy.said("page").removeprefix("http://").rstrip("/")}
    wide = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide == [width, width]


def test_a_table_that_is_wider_than_its_card_shows_that_it_scrolls(
    busy: Sidecar, browser: Browser
) -> None:
    hidden = "[...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth - e.clientWidth)"
    shades = "return getComputedStyle(document.querySelector('.scroll')).backgroundAttachment"
    for width in (400, 1280):
        browser.open(busy.said("page"), width)
        browser.wait(SHOWN, "the figures")
        assert (max(browser.run(f"return {hidden}")) > 0) == (width == 400)
        assert browser.run(shades) == "local, local, scroll, scroll", "covers go along, shades stay"


def test_an_empty_cache_says_how_to_get_a_hit(tmp_path: Path, browser: Browser) -> None:
    sidecar = start(tmp_path)
    browser.open(sidecar.said("page"), 390)
    browser.wait("return !document.getElementById('empty').hidden", "the hint")
    assert "--cache" in browser.text("#empty")
    assert browser.text("#hit-now") == "–"
    client = sidecar.client()
    browser.wait("return document.getElementById('empty').textContent.includes('prompt')", "it")
    Chats(client, "").ask(1, 4)
    Chats(client, "").ask(1, 4)
    browser.wait("return document.getElementById('empty').hidden", "the hint to go")
    assert browser.text("#hit-start") == percent(64, 138)
    sidecar.close()


def test_a_sidecar_that_is_gone_is_told_with_its_last_figures_and_found_again(
    tmp_path: Path, browser: Browser
) -> None:
    sidecar = start(tmp_path)
    Chats(sidecar.client(), "").ask(1, 4)
    browser.open(sidecar.said("page"), 1280)
    browser.wait("return document.getElementById('hit-start').textContent === '0 %'", "figures")
    sidecar.kill()
    browser.wait("return document.body.classList.contains('gone')", "the notice")
    assert "does not answer" in browser.text("#gone")
    assert browser.text("#hit-start") == "0 %"
    sidecar.start()
    browser.wait("return !document.body.classList.contains('gone')", "its next life")
    browser.wait("return document.getElementById('hit-start').textContent === '–'", "new figures")
    sidecar.close()
