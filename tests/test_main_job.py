"""The main job on the real model: equal answers from every tier and across every restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.cluster import Cluster, cluster, complete, metrics, settled, wait_until

from kvist.engine.demo_text import SYSTEM_PROMPT

pytestmark = pytest.mark.model

QUESTIONS = ("\nQ: When are you open?\nA:", "\nQ: How much is a puncture?\nA:")


def prompt(name: str, question: str, characters: int = 2600) -> str:
    return f"Copy of {name}. " + SYSTEM_PROMPT[:characters] + question


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, "demo") as made:
        yield made


def test_answers_are_equal_from_every_tier_and_across_restarts(three: Cluster) -> None:
    sidecar = three.sidecar()
    a = three.engine("a", str(sidecar.socket))
    b = three.engine("b", str(sidecar.socket))
    prompts = [prompt(name, question) for name in "xy" for question in QUESTIONS]
    want = [complete(a, text, 24, kv_cache="bypass").text for text in prompts]

    first = [complete(a, text, 24) for text in prompts]
    assert [answer.text for answer in first] == want
    assert first[0].cached_tokens == 0
    assert first[1].cached["hbm"] > 500, "the second question shares the first one's prefix"

    again = [complete(a, text, 24) for text in prompts]
    assert [answer.text for answer in again] == want
    assert all(answer.cached["hbm"] > 500 for answer in again)

    wait_until(lambda: settled(sidecar), "blocks to reach flash")
    from_dram = [complete(b, text, 24) for text in prompts[:2]]
    assert [answer.text for answer in from_dram] == want[:2]
    assert from_dram[0].cached["dram"] > 500

    three.restart(sidecar)
    three.ready(a)
    three.ready(b)
    from_flash = [complete(b, text, 24) for text in prompts]
    assert [answer.text for answer in from_flash] == want
    assert from_flash[2].cached["flash"] > 500, "b never saw this prompt, and DRAM was lost"

    three.restart(b)
    three.ready(b)
    after_engine = [complete(b, text, 24) for text in prompts]
    assert [answer.text for answer in after_engine] == want
    assert after_engine[2].cached["dram"] > 500, "it rose from flash for the engine's last life"

    sidecar.stop()
    three.restart(b)
    sidecar.start()
    sidecar.wait_ready()
    three.ready(b)
    after_both = [complete(b, text, 24) for text in prompts]
    assert [answer.text for answer in after_both] == want
    assert after_both[0].cached["flash"] > 500


def test_looking_up_and_loading_4000_cached_tokens_makes_no_grpc_call(three: Cluster) -> None:
    sidecar = three.sidecar()
    a = three.engine("a", str(sidecar.socket), "--threads", "2")
    b = three.engine("b", str(sidecar.socket), "--threads", "2")
    text = prompt("z", QUESTIONS[0], 100_000) * 3
    whole = complete(a, text, 2)
    assert whole.prompt_tokens > 4000
    wait_until(lambda: settled(sidecar), "blocks to be stored")

    before = calls(metrics(sidecar))
    hit = complete(b, text, 2)

    assert hit.cached["dram"] >= 4000
    assert hit.text == whole.text
    assert calls(metrics(sidecar)) == before


def calls(samples: dict[str, float]) -> dict[str, float]:
    """Calls that the sidecar has answered, by way and method."""
    ways = ("kvist_grpc_calls_total", "kvist_packet_calls_total")
    found = {name: n for name, n in samples.items() if name.startswith(ways)}
    assert found["kvist_packet_calls_total{method=Commit}"] >= 1
    assert found["kvist_grpc_calls_total{method=Attach}"] >= 2, "the counter itself must work"
    return found


def test_an_embedded_cache_keeps_its_flash_across_a_restart(three: Cluster) -> None:
    flash = three.folder / "flash"
    engine = three.engine("e", "embedded", "--cache-flash-path", str(flash))
    text = prompt("w", QUESTIONS[0])
    want = complete(engine, text, 16)
    blocks = want.prompt_tokens // 64
    wait_until(lambda: metrics(engine)["kvist_engine_stored_blocks_total"] >= blocks, "stores")

    three.restart(engine)
    three.ready(engine)
    got = complete(engine, text, 16)

    assert got.text == want.text
    assert got.cached["flash"] > 500
