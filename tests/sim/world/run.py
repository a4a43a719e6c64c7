"""What happens in a world: a seed draws what it is like, and then step after step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from kvist.proto import cache_pb2
from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.record import PAGE_BYTES
from kvist.proto.slot import fill_slot
from sim.blocks import number_of
from sim.world.faults import FAULTS
from sim.world.forest import FOREST, IN_SPACE, KEYS, PATHS, name_of
from sim.world.invariants import rows_of
from sim.world.scheduler import Killed
from sim.world.worker import SimClient
from sim.world.world import World

STEPS = 70
# Worlds differ in what goes wrong in them: share of steps in which some fault does.
MOODS = (0.0, 0.03, 0.08)


def run(seed: int, tell: Callable[[str], None] | None = None) -> None:
    """Live through the history of a seed. Raises: whatever is found to be wrong."""
    random = Random(seed)
    descriptors = len(os.listdir("/proc/self/fd"))
    world = World(random, tell)
    try:
        _live(world, random)
        world.settle()
        _end(world)
    finally:
        world.scheduler.kill(world.disk.life)
        for client in world.clients:
            client.die()
        world.disk.life.dead = True
        world.store.close()
        world.undo.close()
    left = len(os.listdir("/proc/self/fd")) - descriptors
    assert left <= 0, f"{left} descriptors were not given back"  # less: what failed before went


def _live(world: World, random: Random) -> None:
    for client in world.clients:
        client.attach()
    world.rush()
    share = random.choice(MOODS)
    faults = random.sample(FAULTS, random.randint(1, len(FAULTS)))
    for _ in range(STEPS):
        done = None
        with suppress(Killed):  # the sidecar was told to die at a change of the shared memory
            act = random.choice(faults) if random.random() < share else _step
            done = act(world)
        if done is None:
            world.crash(power=False)
            world.open()
            done = "sidecar killed amid a step, and started"
        world.journal.note(done)


def _step(world: World) -> str:
    """Somebody who can goes on, or something new begins."""
    random = world.random
    draw = random.random()
    if draw < 0.1:
        done = world.tick(random.choice((0.002, 0.05, 0.3, 1.1)))
        world.check()
        return done
    if draw < 0.25:
        return world.rush()
    if draw < 0.45:
        task = world.scheduler.step()
        if task is not None:
            return f"{task.name} goes on"
    if draw < 0.65:
        act = world.waiting()
        if act is not None:
            done = act()
            world.check()
            return done
    return _begin(world, random)


def _begin(world: World, random: Random) -> str:
    if random.random() < 0.25:
        return _remote(world, random)
    client = random.choice(world.clients)
    if not client.connected:
        if client.busy:
            return f"{client.name} is busy"
        client.leave_session()
        client.attach()
        return f"{client.name} attaches"
    act = random.choice((_store, _store, _load, _use))
    number = random.choice(IN_SPACE[client.space])
    if act is not _store:
        number = _sunk(world, random, number, client.space)
    return act(client, number, random)


def _sunk(world: World, random: Random, number: int, space: int | None = None) -> int:
    """Half of the time a block that is on flash only, if there is one, instead of another."""
    index = world.parts.index
    rows = [row for row in rows_of(world.parts) if index.dram(row) is None]
    sunk = [number_of(index.key(row)) for row in rows]
    sunk = [each for each in sunk if space is None or each in IN_SPACE[space]]
    return random.choice(sunk) if sunk and random.random() < 0.5 else number


def _store(client: SimClient, number: int, random: Random) -> str:
    if client.busy:
        return f"{client.name} is busy"
    first = 0 if random.random() < 0.7 else random.randrange(len(PATHS[number]))
    client.store(number, first)
    return f"{client.name} begins to store {first}..b{number}"


def _load(client: SimClient, number: int, _: Random) -> str:
    if client.busy > 1:
        return f"{client.name} is busy"
    client.load(number)
    return f"{client.name} begins to load b{number}"


def _use(client: SimClient, number: int, random: Random) -> str:
    blocks = client.look_up(number)
    use = random.choice((client.cache.touch, client.cache.prefetch, client.cache.prefetch))
    use(KEYS[number], blocks)
    missing = KEYS[number][blocks:]
    if missing and random.random() < 0.3:
        if client.cache.claimant(missing[0]) == "self":
            client.cache.release(missing)
        else:
            client.cache.claim(missing)
    return f"{client.name} {use.__name__} {blocks} of b{number}"


def _remote(world: World, random: Random) -> str:
    """A client that shares no memory, or an operator."""
    number = random.randrange(len(FOREST))
    draw = random.random()
    if draw < 0.4:
        number = _sunk(world, random, number)
        key = FOREST[number].header.key
        world.reads.append((key, world.parts.moves.read(key)))
        world.check()
        return f"remote reads b{number}"
    if draw < 0.65:
        return _put(world, random, number)
    if draw < 0.95:
        offered = world.answers.lookup(cache_pb2.LookupRequest(keys=KEYS[number])).blocks
        world.answers.prefetch(cache_pb2.PrefetchRequest(keys=KEYS[number]))
        world.check()
        return f"remote finds and prefetches {offered} of b{number}"
    return _clear(world, random, number)


def _clear(world: World, random: Random, number: int) -> str:
    space = FOREST[number].header.namespace if random.random() < 0.6 else b""
    dropped = world.answers.clear(cache_pb2.ClearRequest(namespace=space)).dropped_blocks
    gone = {key for key in world.expected if not space or world.model.space(key) == space}
    world.expected -= gone
    world.check(cleared=True)
    left = [row for row in rows_of(world.parts) if not space or _is_of(world, row, space)]
    assert not left, "what was cleared is found"
    return f"clear {'all' if not space else name_of(FOREST[number].header.key)}: {dropped}"


def _is_of(world: World, row: int, space: bytes) -> bool:
    return world.parts.placement.blocks.namespace(row) == space


def _put(world: World, random: Random, number: int) -> str:
    block = FOREST[number]
    record = bytearray(block.header.shape.record_bytes)
    fill_slot(memoryview(record), block.header, block.payload)
    flipped = random.random() < 0.3
    if flipped:
        spot = random.choice((random.randrange(8, 144), PAGE_BYTES + random.randrange(512)))
        record[spot] ^= 1 << random.randrange(8)
    try:
        outcome = world.store.put_record(memoryview(record))
    except (BlockCorrupt, FormatRefused):
        assert flipped, "a good record was refused"
        return f"remote puts b{number} damaged"
    assert not flipped, "a damaged record was taken"
    if outcome == "stored":
        world.model.committed.add(block.header.key)
    world.check()
    return f"remote puts b{number}: {outcome}"


def _end(world: World) -> None:
    """Everybody goes; nothing is left held; a last restart finds what was on flash."""
    counted = world.store.stats()
    assert counted.requested_tokens == world.counted[world.store.boot_epoch], "a count was lost"
    assert counted.requested_tokens == sum(one.requested_tokens for one in counted.tenants)
    for client in world.clients:
        client.die()
    world.settle()
    world.tick(0.05)
    assert len(world.store._sessions) == 0
    assert world.store._sessions.reserved_slots == 0
    assert len(world.parts.claims) == 0, "a claim outlives its session"
    groups = world.parts.placement.tenancy._groups.values()
    assert not [group.name for group in groups if group.reserved], "a tenant's slots leaked"
    dram = world.parts.dram
    used = dram.slots - dram.free_slots - dram.quarantined
    index = world.parts.index
    assert used == sum(index.dram(row) is not None for row in rows_of(world.parts))
    assert not list(Path(world.folder).glob("ring-*")), "a ring file was left"
    world.close()
    world.open()
    world.settle()
