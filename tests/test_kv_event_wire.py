"""Events as bytes, frozen, and the two tables behind them: the journal and what was told."""

from __future__ import annotations

import io
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.cachesvc.events.journal import Facts, Journal
from kvist.cachesvc.events.publisher import Publisher
from kvist.cachesvc.events.settings import KvEventsConfig, checked_kv_events, parse_kv_events
from kvist.cachesvc.events.told import EVENT_BLOCKS, Told
from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.kv_events import (
    CPU,
    GPU,
    STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    encode_batch,
    hash_of,
)

EVENTS: list[Event] = [
    BlockStored([1, 2**64 - 1], None, [5, 6, 7, 8], 2, None, CPU, None),
    BlockStored([3], 2**64 - 1, [9, 10], 2, None, STORAGE, None, [("kvist:00",)]),
    BlockRemoved([1], GPU),
    AllBlocksCleared(),
]
# What vLLM 0.32 sends for these (compared with its own classes in under_vllm/test_kv_events.py).
AS_MAPS = (
    "93cb3ff80000000000009488a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739201cf"
    "ffffffffffffffffb1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739405060708aa626c"
    "6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c089a4747970"
    "65ab426c6f636b53746f726564ac626c6f636b5f6861736865739103b1706172656e745f626c6f636b5f686173"
    "68cfffffffffffffffffa9746f6b656e5f69647392090aaa626c6f636b5f73697a6502a76c6f72615f6964c0a6"
    "6d656469756da753544f52414745a96c6f72615f6e616d65c0aa65787472615f6b6579739191a86b766973743a"
    "303083a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739101a66d656469756da347"
    "505581a474797065b0416c6c426c6f636b73436c656172656400"
)
AS_ARRAYS = (
    "93cb3ff80000000000009498ab426c6f636b53746f7265649201cfffffffffffffffffc0940506070802c0a343"
    "5055c099ab426c6f636b53746f7265649103cfffffffffffffffff92090a02c0a753544f52414745c09191a86b"
    "766973743a303093ac426c6f636b52656d6f7665649101a347505591b0416c6c426c6f636b73436c6561726564"
    "00"
)


def test_golden_events() -> None:
    assert encode_batch(1.5, EVENTS, "map").hex() == AS_MAPS
    assert encode_batch(1.5, EVENTS, "array").hex() == AS_ARRAYS
    assert hash_of(BlockKey(bytes(range(16)))) == 0x08090A0B0C0D0E0F


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def facts(number: int, tokens: bytes = b"\1\0\0\0") -> Facts:
    """Of a block in a tree in which half the number is the parent."""
    return Facts(key(number // 2) if number > 1 else NO_KEY, tokens, "")


class State:
    """What a router makes of events."""

    def __init__(self) -> None:
        self.copies: set[tuple[int, str]] = set()
        self.strays = 0

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.copies.clear()
            elif isinstance(event, BlockRemoved):
                self.copies -= {(each, event.medium or "") for each in event.block_hashes}
            else:
                known = {each for each, _ in self.copies}
                parent = event.parent_block_hash
                self.strays += parent is not None and parent not in known
                self.copies |= {(each, event.medium or "") for each in event.block_hashes}
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)


@given(st.lists(st.tuples(st.integers(1, 15), st.sampled_from([GPU, CPU, STORAGE, "tell"]))))
def test_whatever_came_and_went_a_router_that_is_told_in_between_ends_with_what_is_there(
    steps: list[tuple[int, str]],
) -> None:
    journal, told, heard = Journal(), Told(), State()
    there: set[tuple[int, str]] = set()

    def tell() -> None:
        for events in told.apply(journal.take()):
            heard.take(events)
        assert heard.copies == {(hash_of(key(number)), medium) for number, medium in there}

    for number, medium in steps:
        stored = {each for each, _ in there}
        if medium == "tell":
            tell()
        elif (number, medium) in there:
            others = {entry for entry in there if entry != (number, medium)}
            has_children = {2 * number, 2 * number + 1} & stored
            if not has_children or number in {each for each, _ in others}:
                there.discard((number, medium))
                journal.removed(key(number), medium)
        elif number == 1 or number // 2 in stored:
            there.add((number, medium))
            journal.stored(key(number), medium, facts(number))
    tell()
    assert heard.strays == 0
    late = State()
    for events in told.snapshot(1):
        late.take(events)
    assert (late.copies, late.strays) == (heard.copies, 0)
    journal.close()


def test_a_damaged_chain_that_leads_back_to_itself_is_told_and_ends() -> None:
    journal, told = Journal(), Told()
    journal.stored(key(1), CPU, Facts(key(2), b"", ""))
    journal.stored(key(2), CPU, Facts(key(1), b"", ""))
    assert sum(len(events) for events in told.apply(journal.take())) == 2
    assert sum(len(events) for events in told.snapshot(1)) == 3
    journal.close()


def test_what_came_and_went_unheard_is_not_told_and_chains_are_one_event() -> None:
    journal, told = Journal(), Told()
    for _ in range(1000):
        journal.stored(key(1), CPU, facts(1))
        journal.removed(key(1), CPU)
    assert len(journal) == 1
    assert list(told.apply(journal.take())) == []
    for number in (1, 2, 4, 8):
        journal.stored(key(number), CPU, facts(number))
    ((event,),) = told.apply(journal.take())
    assert isinstance(event, BlockStored)
    assert event.block_hashes == [1, 2, 4, 8]
    assert event.token_ids == [1, 1, 1, 1]
    journal.close()


def test_tokens_that_become_known_of_a_block_that_is_gone_tell_nothing() -> None:
    journal, told = Journal(), Told()
    journal.known(key(1), facts(1))
    journal.stored(key(2), STORAGE, facts(1, b""))
    journal.removed(key(2), STORAGE)
    journal.known(key(2), facts(1))
    assert list(told.apply(journal.take())) == []
    journal.stored(key(2), STORAGE, facts(1, b""))
    journal.known(key(2), facts(1))
    ((stored, again),) = told.apply(journal.take())
    assert isinstance(stored, BlockStored)
    assert isinstance(again, BlockStored)
    assert (stored.token_ids, again.token_ids, again.medium) == ([], [1], STORAGE)
    journal.close()


def test_a_block_whose_tokens_become_known_is_told_again_in_all_its_media() -> None:
    journal, told = Journal(), Told()
    journal.stored(key(1), STORAGE, facts(1, b""))
    ((event,),) = told.apply(journal.take())
    assert isinstance(event, BlockStored)
    assert (event.token_ids, event.block_size) == ([], 0)
    journal.stored(key(1), CPU, facts(1))
    (events,) = told.apply(journal.take())
    assert [(e.medium, e.token_ids) for e in events if isinstance(e, BlockStored)] == [
        (CPU, [1]),
        (STORAGE, [1]),
    ]
    journal.close()


@pytest.mark.parametrize("batches", [1, 3, 1000])
def test_a_snapshot_fits_the_numbers_that_there_are_for_it(batches: int) -> None:
    journal, told = Journal(), Told()
    for number in range(1, 2000):
        for medium in (CPU, STORAGE):
            journal.stored(key(number), medium, facts(number))
    for events in told.apply(journal.take()):
        assert sum(len(e.block_hashes) for e in events if isinstance(e, BlockStored)) <= (
            EVENT_BLOCKS + 2
        )
    lists = list(told.snapshot(batches))
    assert len(lists) <= batches
    assert lists[0][0] == AllBlocksCleared()
    heard = State()
    for events in lists:
        heard.take(events)
    assert len(heard.copies) == 2 * 1999
    assert heard.strays == 0
    journal.close()


def test_an_address_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigInvalid, match=f"endpoint: cannot use .*:{port}"):
            Publisher(KvEventsConfig(endpoint=f"tcp://*:{port}"), Journal(), Log(io.StringIO()))


def test_settings_are_vllms_and_wrong_ones_say_the_fix() -> None:
    vllms = (
        '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", '
        '"replay_endpoint": "tcp://*:5558", "buffer_steps": 10, "hwm": 5, "topic": "kv@a@b", '
        '"max_queue_size": 7}'
    )
    config = parse_kv_events(vllms)
    assert config == KvEventsConfig(
        replay_endpoint="tcp://*:5558", buffer_steps=10, hwm=5, topic="kv@a@b", max_queue_size=7
    )
    for off in ("", '{"enable_kv_cache_events": false}', '{"publisher": "null"}'):
        assert parse_kv_events(off) is None
    for text, names in {
        "{": "JSON object",
        '{"endpoints": "tcp://*:1"}': "endpoints",
        '{"endpoint": "5557"}': "endpoint",
        '{"publisher": "nats"}': "publisher",
        '{"buffer_steps": 0}': "buffer_steps",
        '{"endpoint": "tcp://*:1", "replay_endpoint": "tcp://*:1"}': "replay_endpoint",
    }.items():
        with pytest.raises(ConfigInvalid, match=f"--kv-events-config: .*{names}"):
            checked_kv_events(text)
    with pytest.raises(ConfigInvalid, match="--kv-events-config"):
        EngineConfig(model="demo", kv_events_config="[]")
