"""The vLLM plugin's two halves without vLLM: a real sidecar, real threads, KV memory as vLLM lays
it out, and requests that have the fields which the plugin reads (pinned in under_vllm/)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sim import vllm_fixtures as fixtures
from sim.sidecar import QUIET, Sidecar, wait_until
from sim.vllm_engine import Engine, Request, prompt, step
from sim.vllm_memory import NAMESPACE, SIZE

from kvist.cachesvc.client import CacheClient
from kvist.engine.plugins.vllm.copying import Copier
from kvist.engine.plugins.vllm.lookups import (
    Adapters,
    Load,
    Medium,
    Names,
    digest_of,
    unnamed,
)
from kvist.engine.plugins.vllm.planning import Planner, Roles
from kvist.engine.plugins.vllm.pool import STEP_BLOCKS, PoolGauge
from kvist.proto.keys import BlockKey, block_keys

sidecar, engine = fixtures.sidecar, fixtures.engine


def test_blocks_that_were_saved_come_back_into_other_blocks_byte_for_byte(engine: Engine) -> None:
    request = Request("a", prompt(1, 5 * SIZE + 3))
    engine.compute(request, [7, 3, 30, 12, 5, 9])
    # The step is over: what vLLM does with its blocks now must not matter.
    saved = engine.runs[:, [7, 3, 30, 12, 5]].copy()
    engine.runs[:] = 0
    engine.stored(request)
    again = Request("b", list(request.all_token_ids))
    job = engine.load(again, [20, 21, 22, 23, 24, 25])
    assert (job.came, job.reason) == (5, "")
    assert np.array_equal(engine.runs[:, 20:25], saved)
    assert not engine.runs[:, 25:].any()
    assert engine.planner.sources(again, 5 * SIZE) == {"dram": 5 * SIZE}
    counts = engine.planner.take_counts()
    assert counts["hit_tokens.dram"] == 5 * SIZE
    assert sum(counts.values()) == 2 * (5 * SIZE + 3)
    assert engine.copier.take_counts()["save_blocks"] == 5


def test_only_what_vllm_lacks_is_asked_for_and_only_what_the_cache_lacks_is_saved(
    engine: Engine,
) -> None:
    first = Request("a", prompt(2, 3 * SIZE))
    engine.compute(first, [1, 2, 3])
    engine.stored(first)
    longer = Request("b", first.all_token_ids + prompt(3, 2 * SIZE))
    assert engine.planner.matched(longer, 0) == 3 * SIZE
    assert engine.planner.matched(longer, SIZE) == 2 * SIZE
    assert engine.planner.matched(longer, 3 * SIZE) == 0
    longer.num_computed_tokens = 3 * SIZE
    saves = step(engine.planner, longer, 2 * SIZE, [1, 2, 3, 4, 5])
    assert [(save.block, save.item.depth) for save in saves] == [(4, 3), (5, 4)]


def test_a_block_is_saved_when_its_last_token_is_known(engine: Engine) -> None:
    """With steps under way vLLM counts a token as computed before it is sampled."""
    request = Request("a", prompt(4, SIZE - 1))
    assert not step(engine.planner, request, SIZE - 1, [1])
    assert not step(engine.planner, request, 1, [1])  # its token is still on its way
    request.all_token_ids.append(7)
    (save,) = step(engine.planner, request, 1, [1, 2])
    assert save.item.tokens == np.asarray(request.all_token_ids, "<u4").tobytes()
    assert not step(engine.planner, request, 1, [1, 2])


def test_blocks_that_vllm_does_not_want_are_counted_as_computed(engine: Engine) -> None:
    request = Request("a", prompt(12, 3 * SIZE + 1))
    engine.compute(request, [1, 2, 3, 4])
    engine.stored(request)
    engine.planner.take_counts()
    again = Request("b", list(request.all_token_ids))
    assert engine.planner.matched(again, 0) == 3 * SIZE
    engine.planner.admitted(again, [5, 6, 7, 8], 0)  # it asked for the logprobs of its prompt
    assert engine.planner.take_counts() == {"miss_tokens.tail": 1, "miss_tokens.no_cache": 3 * SIZE}


def test_a_load_that_fails_names_its_blocks_and_is_not_tried_again(engine: Engine) -> None:
    request = Request("a", prompt(5, 4 * SIZE + 1))
    engine.compute(request, [1, 2, 3, 4, 5])
    engine.stored(request)
    again = Request("b", list(request.all_token_ids))
    tokens = engine.planner.matched(again, 0)
    assert tokens == 4 * SIZE
    engine.planner.admitted(again, [10, 11, 12, 13, 14], tokens)
    (work,) = engine.planner.plan(SimpleNamespace(num_scheduled_tokens={}))
    (load,) = work.loads
    wrong = replace(load.wanted[2], tokens=bytes(4 * SIZE))
    engine.copier.load(Load("b", [*load.wanted[:2], wrong, load.wanted[3]], load.blocks))
    (job,) = engine.copier.take_ended(10.0)
    assert (job.came, job.reason) == (2, "corrupt")
    engine.planner.loaded({"b": [(job.came, job.reason)]})
    assert engine.planner.matched(again, 0) == 0
    assert engine.planner.take_counts()["miss_tokens.corrupt"] == 2 * SIZE
    # What is computed instead is stored, whatever the index still shows.
    again.num_computed_tokens = 2 * SIZE
    saves = step(engine.planner, again, 2 * SIZE + 1, [10, 11, 12, 13, 14])
    assert [save.item.depth for save in saves] == [2, 3]


def test_a_dead_sidecar_is_a_miss_and_vllm_goes_on(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, ["--slot-bytes", "16KiB"])
    sidecar.start()
    engine = Engine(sidecar)
    request = Request("a", prompt(6, 2 * SIZE + 1))
    engine.compute(request, [1, 2, 3])
    engine.stored(request)
    engine.planner.matched(Request("b", list(request.all_token_ids)), 0)
    sidecar.kill()
    wait_until(lambda: all(one.state == "detached" for one in engine.clients), "the end")
    late = Request("c", list(request.all_token_ids))
    assert engine.planner.matched(late, 0) == 0
    assert step(engine.planner, late, 2 * SIZE + 1, [1, 2, 3]) == []
    engine.planner.admitted(late, [1, 2, 3], 0)
    assert engine.planner.take_counts()["miss_tokens.detached"] == 2 * SIZE
    engine.close()
    sidecar.close()


def sessions_anew(engine: Engine, times: int) -> None:
    """Wait until the sidecar's end was noticed, and its next life too."""
    wait_until(
        lambda: all(one.reattaches == times and one.state == "attached" for one in engine.clients),
        "a new session",
    )


def test_a_request_is_put_off_while_its_blocks_rise_from_flash_and_then_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    flags = ["--slot-bytes", "16KiB", *flash, "--flash-admission", "always"]
    sidecar = Sidecar(tmp_path / "sidecar", flags)
    sidecar.start()
    engine = Engine(sidecar)
    request = Request("a", prompt(13, 3 * SIZE + 1))
    engine.compute(request, [1, 2, 3, 4])
    engine.stored(request)
    sidecar.stop()  # writes what is in DRAM only to flash
    sidecar.start()
    sessions_anew(engine, 1)
    again = Request("b", list(request.all_token_ids))
    assert engine.planner.matched(again, 0) is None
    assert engine.planner.rising
    wait_until(lambda: engine.planner.matched(again, 0) == 3 * SIZE, "blocks to rise")
    assert engine.load(again, [5, 6, 7, 8]).came == 3
    assert engine.planner.sources(again, 3 * SIZE) == {"flash": 3 * SIZE}
    counts = engine.planner.take_counts()
    assert counts["hit_tokens.flash"] == 3 * SIZE
    assert not engine.planner.rising
    assert counts["rise_waits"] == 1
    assert 0 < counts["rise_wait_seconds"] < 10
    # When flash is too slow, what is in DRAM by then has to do: here nothing.
    monkeypatch.setattr("kvist.engine.plugins.vllm.planning.FLASH_WAIT_S", 0.0)
    sidecar.stop()
    sidecar.start()
    sessions_anew(engine, 2)
    late = Request("c", list(request.all_token_ids))
    assert engine.planner.matched(late, 0) == 0
    engine.planner.admitted(late, [5, 6, 7, 8], 0)
    assert engine.planner.take_counts()["miss_tokens.flash_late"] == 3 * SIZE
    engine.close()
    sidecar.close()


def test_after_a_reset_nothing_of_before_is_found(engine: Engine) -> None:
    request = Request("a", prompt(7, 2 * SIZE + 1))
    engine.compute(request, [1, 2, 3])
    engine.stored(request)
    engine.planner.reset()
    assert engine.planner.matched(Request("b", list(request.all_token_ids)), 0) == 0
    assert step(engine.planner, request, 1, [1, 2, 3]) == []


@pytest.mark.parametrize(
    ("roles", "found", "saved"),
    [(Roles(True, False), True, 0), (Roles(False, True), False, 2)],
    ids=["consumer", "producer"],
)
def test_kv_role_says_what_is_done(engine: Engine, roles: Roles, found: bool, saved: int) -> None:
    request = Request("a", prompt(8, 2 * SIZE + 1))
    engine.compute(request, [1, 2, 3])
    engine.stored(request)
    other = Planner(engine.clients[0], [NAMESPACE], roles)
    assert bool(other.matched(Request("b", list(request.all_token_ids)), 0)) is found
    unseen = Request("c", prompt(80 + saved, 2 * SIZE + 1))
    assert len(step(other, unseen, 2 * SIZE + 1, [1, 2, 3])) == saved


def test_the_sidecar_is_told_how_full_vllms_pool_is_a_few_blocks_a_step(
    engine: Engine, sidecar: Sidecar
) -> None:
    blocks = [SimpleNamespace(ref_cnt=0, block_hash=None) for _ in range(3 * STEP_BLOCKS - 10)]
    null, held, kept = blocks[0], blocks[1 : 2 * STEP_BLOCKS], blocks[2 * STEP_BLOCKS : -40]
    null.ref_cnt = 1
    for block in held:
        block.ref_cnt = 2
    for block in kept:
        block.block_hash = b"hash"
    gauge = PoolGauge(SimpleNamespace(blocks=blocks, null_block=null))

    def told() -> dict[str, float]:
        workers = json.loads(sidecar.get("stats.json"))["workers"]
        rates = [one["rates"] for one in workers if one["rates"]]
        return rates[0] if rates else {}

    for _ in range(2):
        engine.planner.tell(gauge)
    assert told() == {}
    engine.planner.tell(gauge)
    filled = len(held) + len(kept)
    assert told() == {"pool_blocks.total": len(blocks) - 1, "pool_blocks.filled": filled}
    for block in blocks:
        block.ref_cnt, block.block_hash = 0, None
    for _ in range(3):
        engine.planner.tell(gauge)
    assert told().get("pool_blocks.filled", 0) == 0


def changed(change: Callable[[Request], None]) -> bytes:
    request = Request("a", [1, 2, 3])
    change(request)
    return digest_of(NAMESPACE, request, Adapters())


def test_salt_and_adapter_each_make_another_namespace(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"lora")
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    digests = [
        NAMESPACE.digest(),
        changed(lambda one: setattr(one, "cache_salt", "acme:1")),
        changed(lambda one: setattr(one, "lora_request", lora)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_of(NAMESPACE, Request("a", [1]), Adapters()) == digests[0]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"LORA")
    assert changed(lambda one: setattr(one, "lora_request", lora)) not in digests


def test_an_adapter_whose_files_change_under_vllm_has_no_name_until_it_is_loaded_anew(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"lora")
    request, adapters = Request("a", [1, 2, 3]), Adapters()
    request.lora_request = SimpleNamespace(
        lora_int_id=1, lora_path=str(tmp_path), load_inplace=False
    )
    assert not unnamed(request, adapters)
    before = digest_of(NAMESPACE, request, adapters)
    weights.write_bytes(b"another")  # vLLM goes on with what it has read
    assert unnamed(request, adapters) == "adapter"
    request.lora_request.lora_int_id = 2
    assert not unnamed(request, adapters)
    after = digest_of(NAMESPACE, request, adapters)
    assert after != before
    weights.unlink()  # between the two looks
    assert digest_of(NAMESPACE, request, adapters) not in (before, after)
    assert digest_of(NAMESPACE, request, adapters) != digest_of(NAMESPACE, request, adapters)


def test_prompts_share_their_blocks_up_to_the_first_picture_that_differs() -> None:
    digest, tokens = NAMESPACE.digest(), prompt(14, 6 * SIZE)

    def keys(*media: Medium) -> list[BlockKey]:
        grown = Names(digest, NAMESPACE.format, "", media)
        for end in range(0, 6 * SIZE + 1, 5):  # as an answer grows
            grown.keys(tokens[:end])
        whole = Names(digest, NAMESPACE.format, "", media).keys(tokens)
        assert grown.keys(tokens) == whole
        assert len(whole) == len(set(whole)) == 6
        return whole

    cat, dog = Medium("cat", 2 * SIZE + 3, 8), Medium("dog", 2 * SIZE + 3, 8)
    late, moved = Medium("owl", 4 * SIZE, 2 * SIZE), Medium("cat", 2 * SIZE + 4, 8)
    plain = keys()
    assert plain == block_keys(digest, tokens, SIZE)
    variants = [keys(cat), keys(dog), keys(moved), keys(cat, Medium("dog", 2 * SIZE + 12, 2))]
    for one in variants:
        assert one[:2] == plain[:2]
    assert len({key for one in (plain, *variants) for key in one[2:]}) == 5 * 4
    assert keys(cat, late)[:4] == keys(cat)[:4]
    assert not set(keys(cat, late)[4:]) & set(keys(cat)[4:])
    # One that begins in the last block of a text is not in the blocks before, wherever it ends.
    assert keys(Medium("owl", 6 * SIZE, 4)) == plain


def test_requests_without_names_are_counted_and_neither_found_nor_saved(engine: Engine) -> None:
    embedded = Request("a", prompt(9, 3 * SIZE))
    embedded.prompt_embeds = object()
    assert engine.planner.matched(embedded, 0) == 0
    engine.planner.admitted(embedded, [1, 2, 3], 0)
    assert step(engine.planner, embedded, 3 * SIZE, [1, 2, 3]) == []
    counts = engine.planner.take_counts()
    assert counts["unnamed_requests.prompt_embeds"] == 1
    assert counts["miss_tokens.no_cache"] == 2 * SIZE
    lost = Request("b", [1])
    lost.lora_request = SimpleNamespace(lora_int_id=1, lora_path="/nowhere", load_inplace=False)
    assert unnamed(lost, Adapters()) == "adapter"


def test_buffers_are_bounded_and_what_finds_none_is_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.engine.plugins.vllm.copying.BUFFERS_BYTES", 1)
    client: CacheClient = engine.clients[1]
    small = Copier(client, engine.memory, QUIET)
    request = Request("a", prompt(11, 3 * SIZE))
    small.save(step(engine.planner, request, 3 * SIZE, [1, 2, 3]))
    small.wait_gathered()
    assert small.take_counts()["save_drops.queue_full"] == 2
