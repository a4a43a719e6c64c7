"""What goes wrong in a world, one function a fault; each says what it did."""

from __future__ import annotations

import struct

import numpy as np

from kvist.proto import cache_pb2
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import PAGE_BYTES
from kvist.proto.slot import pack_header
from sim.blocks import number_of
from sim.world.forest import FOREST, IN_SPACE, SLOT_BYTES, name_of
from sim.world.invariants import rows_of
from sim.world.worker import SimClient
from sim.world.world import World

_WEATHER = (
    {"pwrite"},
    {"pread"},
    {"index"},
    {"pread", "pwrite", "index", "sync", "fallocate"},
    {"pwrite", "sync"},
)
_GENERATION = struct.Struct("<Q")


def kill_sidecar(world: World) -> str:
    """SIGKILL, and a new life that finds what was written."""
    world.crash(power=False)
    _damage_start(world)
    world.open()
    return f"sidecar killed and started: flash {world.state}"


def cut_power(world: World) -> str:
    """Everybody dies, and of what was not synced anything may be lost."""
    world.crash(power=True)
    _damage_start(world)
    world.open()
    return f"power lost and back: flash {world.state}"


def _damage_start(world: World) -> None:
    random, medium = world.random, world.medium
    if random.random() < 0.3:
        medium.index_damaged = True
    if random.random() < 0.2:
        medium.die_in = random.randrange(8)


def restart_sidecar(world: World) -> str:
    """A clean stop and start."""
    world.disarm()
    world.close()
    world.open()
    return f"sidecar restarted: flash {world.state}"


def kill_amid_step(world: World) -> str:
    """The sidecar dies at one of its next changes of the shared memory."""
    world.arm(world.random.randrange(4))
    return "sidecar will die amid a step"


def kill_worker(world: World) -> str:
    """SIGKILL; another one comes."""
    place = world.random.randrange(len(world.clients))
    client = world.clients[place]
    client.die()
    world.calls = [call for call in world.calls if call.sender is not client]
    world.answered = [call for call in world.answered if call.sender is not client]
    name = f"w{world.born}"
    world.clients[place] = SimClient(world, name, client.space, world.journal)
    world.born += 1
    return f"{client.name} killed"


def break_connection(world: World) -> str:
    """A worker's stream ends while the process goes on, and may be amid a copy."""
    storing = [client for client in world.clients if client.held]
    client = world.random.choice(storing or world.clients)
    client.lose_connection()
    if client.life is not None and world.random.random() < 0.5:
        client.life.ended = True
    return f"{client.name} loses its connection"


def change_weather(world: World) -> str:
    """The disk begins to fail, or works again."""
    medium = world.medium
    if medium.broken:
        medium.broken.clear()
    else:
        medium.broken |= world.random.choice(_WEATHER)
    return f"disk fails: {sorted(medium.broken)}"


def fail_for_long(world: World) -> str:
    """The disk fails until the store lets the folder go, or nearly."""
    world.medium.broken |= _WEATHER[3]
    for _ in range(world.random.choice((4, 10))):
        world.tick(1.1)
        world.rush()
        world.check()
    return f"disk has failed for long: flash {world.state}"


def lose_write(world: World) -> str:
    """The next write is acknowledged and never made."""
    world.medium.lose = True
    return "a write will be lost"


def tear_write(world: World) -> str:
    """The next write stops half way and fails."""
    world.medium.tear = True
    return "a write will be torn"


def hang_disk(world: World) -> str:
    """Flash threads stand still, or go on."""
    scheduler = world.scheduler
    scheduler.frozen = None if scheduler.frozen else world.disk.life
    return f"disk {'hangs' if scheduler.frozen else 'goes on'}"


def flip_on_flash(world: World) -> str:
    """A bit of a record on flash changes."""
    if not world.medium.data:
        return "no flash"
    shown = list(world.on_flash().items())
    if shown and world.random.random() < 0.8:
        key, slot = world.random.choice(shown)
        world.reads.append((key, world.parts.moves.read(key)))
    else:
        slot = world.random.randrange(len(world.medium.data) // SLOT_BYTES)
    world.medium.flip(slot, _place(world))
    world.forget_damaged()
    world.check()
    return f"bit flipped in flash slot {slot}"


def flip_in_dram(world: World) -> str:
    """A bit of a block in DRAM changes."""
    index, dram = world.parts.index, world.parts.dram
    shown = [row for row in rows_of(world.parts) if index.dram(row) is not None]
    if not shown:
        return "nothing in DRAM"
    row = world.random.choice(shown)
    slot = index.dram(row)
    assert slot is not None
    dram.slot_view(slot)[_place(world)] ^= 1 << world.random.randrange(8)
    key = index.key(row)
    _spoil(world, slot, key)
    for client in world.clients:
        if client.connected and number_of(key) in IN_SPACE[client.space] and not client.busy:
            client.load(number_of(key))
    return f"bit flipped in DRAM slot {slot}, {name_of(key)}"


def _place(world: World) -> int:
    """An offset in a slot that holds something: header, tokens or payload."""
    payload = world.random.choice((PAGE_BYTES, 2 * PAGE_BYTES)) + 5
    return world.random.choice((world.random.randrange(8, 144), payload))


def _spoil(world: World, slot: int, key: BlockKey) -> None:
    (generation,) = _GENERATION.unpack_from(world.parts.dram.slot_view(slot))
    world.model.spoiled_slots[slot] = generation
    world.model.spoiled.add(key)


def commit_wrongly(world: World) -> str:
    """A worker with a fault commits what it has not filled, or filled with something else."""
    client = world.random.choice(world.clients)
    if client.life is None or not client.connected or client.busy or client.life.ended:
        return f"{client.name} is busy"
    present = world.model.present
    storable = [
        each
        for each in (FOREST[number] for number in IN_SPACE[client.space])
        if each.header.key not in present and {each.header.parent} <= {NO_KEY, *present}
    ]
    if not storable:
        return "all is stored"
    block = world.random.choice(storable)
    header = block.header
    name = cache_pb2.BlockName(key=header.key, parent=header.parent)
    session = client.life.session
    answers = world.answers
    (answer,) = answers.reserve(
        cache_pb2.ReserveRequest(session=session, blocks=[name])
    ).reservations
    if answer.outcome != cache_pb2.Reservation.RESERVED:
        return f"{client.name} may not store {name_of(header.key)}"
    slot = world.parts.dram.slot_view(answer.slot)
    fault = world.random.choice(("nothing", "another block", "no payload", "another's slot"))
    if fault == "another block":
        other = FOREST[(FOREST.index(block) + 1) % len(FOREST)]
        pack_header(other.header, slot)
    elif fault == "no payload":
        pack_header(header, slot)
        slot[PAGE_BYTES : PAGE_BYTES + 64] = np.full(64, 0xEE, np.uint8).data
    slots = [answer.slot] if fault != "another's slot" else [answer.slot + 1, 2**32 - 1]
    committed = answers.commit(cache_pb2.CommitRequest(session=session, slots=slots)).committed
    is_taken = list(committed) == [True]
    # A report of damage that waited in a ring may have dropped the parent in between.
    stands = header.parent == NO_KEY or world.parts.index.locate(header.parent) is not None
    assert is_taken == (fault == "no payload" and stands), f"{fault}: {committed}"
    if is_taken:  # nothing but its header is looked at before somebody reads it
        world.model.committed.add(header.key)
        _spoil(world, answer.slot, header.key)
    elif fault == "another's slot":
        answers.abort(cache_pb2.AbortRequest(session=session, slots=[answer.slot]))
    world.check()
    return f"{client.name} commits {name_of(header.key)} with {fault}: {committed}"


FAULTS = (
    kill_sidecar, kill_sidecar, cut_power, restart_sidecar, kill_amid_step, kill_worker,
    kill_worker, break_connection, change_weather, change_weather, fail_for_long, lose_write,
    tear_write, hang_disk, flip_on_flash, flip_in_dram, commit_wrongly,
)  # fmt: skip
