"""The engine's door to the cache: attach, look up, load, store, and survive the sidecar.

Threads. One thread of the client's own attaches, waits for the session to end and attaches
again. lookup, touch, prefetch and count may be called from any thread; load from many at once;
store from one. Whoever uses a session's maps enters it first; when the session ends, nobody new
gets in, and only when the last has left are the maps closed and the ring's lock released, by
which the sidecar knows that the session's slots cannot be written any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.control import PROTOCOL_VERSION, Control, GrpcControl, local_address
from kvist.cachesvc.worker.counting import Counting, account
from kvist.cachesvc.worker.life import Claimant, Found, Life
from kvist.cachesvc.worker.loading import LayerLoad, load_block, risen, stream_blocks
from kvist.cachesvc.worker.storing import StoreItem, Storer, StoreResult
from kvist.cachesvc.worker.trial import RETRY_S, TrialPage, run_trial
from kvist.proto import cache_pb2
from kvist.proto.errors import KvistError
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey, Namespace
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import CLAIM, EXPECT, FOLLOW, PREFETCH, RELEASE, TOUCH
from kvist.transfer.device import Target
from kvist.transfer.pace import Pace

__all__ = ["CacheClient", "Claimant", "Found", "open_cache"]

BACKOFF_MIN_S = 0.02
BACKOFF_MAX_S = 0.2


class CacheClient:
    """The cache of one worker. See the top of the file for its threads.

    Args:
        control: how to reach the sidecar; closed by close.
        namespace: of the worker's blocks.
        name: of the worker, for the sidecar's logs and metrics.
        log: where attaching and detaching is told.
        now: clock of deadlines, seconds.
        wall: seconds since 1970, for the time of creation of a record.

    Attributes:
        trial: a page of the worker, for the trial before the first hit of each session
            (cachesvc/worker/trial.py); None makes none. Set before start.
        model: a name for people, in the sidecar's metrics. Set before start.
        without: why an embedded cache has no flash tier though it was to have one, else "".
        refusal: why the last attempt to attach failed, in words; "" when it did not.
        pace: of copies out and in; may be set as long as nothing is copied.
        reattaches: how often a session followed an earlier one.
        bell_failures: wake-ups that the sidecar did not take; it looks by itself soon after.
    """

    def __init__(
        self,
        control: Control,
        namespace: Namespace,
        name: str,
        log: Log,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.trial: TrialPage | None = None
        self.model, self.without, self.refusal = "", "", ""
        self.pace = Pace()
        self.reattaches = 0
        self.bell_failures = 0
        self._control = control
        self._request = cache_pb2.AttachRequest(
            protocol_version=PROTOCOL_VERSION,
            client=name,
            pid=os.getpid(),
            namespace=namespace.digest(),
            namespace_text=f"{namespace.model} {namespace.compute} salt={namespace.salt!r}",
            payload_bytes=namespace.format.payload_bytes,
            block_tokens=namespace.format.block_tokens,
        )
        self._namespace = namespace
        self._distrust = ""
        self._log = log
        self._now = now
        self._life: Life | None = None
        self._attached = threading.Event()
        self._stopping = threading.Event()
        self._storer = Storer(control, log, wall)
        self._thread = threading.Thread(target=self._run, name="kvist-attach", daemon=True)
        self._counting = Counting()

    # The session.

    def start(self) -> None:
        """Begin to attach, in the background; an absent sidecar is no error."""
        self._thread.start()

    @property
    def state(self) -> str:
        """ "attached" or "detached"."""
        return "attached" if self._attached.is_set() else "detached"

    @property
    def rpc_calls(self) -> int:
        """Control calls made so far, Attach included."""
        return self._control.calls

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until attached; False when that took longer."""
        return self._attached.wait(timeout_s)

    def close(self) -> None:
        """End the session, let the maps go and stop the thread."""
        self._stopping.set()
        self._control.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while not self._stopping.is_set():
            try:
                self._live_once()
                backoff_s, self.refusal = BACKOFF_MIN_S, ""
            except (KvistError, OSError) as error:
                if str(error) != self.refusal and not self._stopping.is_set():
                    self.refusal = str(error)
                    self._log.warning("cache not attached", reason=self.refusal)
            except Exception as error:  # a mistake must cost this session only, not all to come
                self._log.error("session failed", error=repr(error))
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _live_once(self) -> None:
        """Attach and stay until the session ends.

        Raises: Detached, ConfigInvalid, FormatRefused, OSError when it did not come about.
        """
        self._request.model = self.model
        reply = self._control.attach(self._request)
        try:
            life = Life(reply, None if self.trial is None else self.trial.pinner)
        except BaseException:
            self._control.hang_up()
            raise
        try:
            self._counting.settle(life)
            self._distrust = self._try(life)
            if self._distrust:
                self._log.error("cache not used", reason=self._distrust, retry_s=RETRY_S)
                self._stopping.wait(RETRY_S)
                return
            self._life = life
            self._attached.set()
            self._log.info("cache attached", session=life.session, epoch=life.boot_epoch.hex())
            reason = self._control.wait_ended()
        finally:
            self._attached.clear()
            self._life = None
            self._control.hang_up()
            life.end()
        self.reattaches += not self._stopping.is_set()
        if not self._stopping.is_set():
            self._log.warning("cache detached", session=life.session, reason=reason)

    def _try(self, life: Life) -> str:
        """Make the trial; what is wrong, or "". Raises: Detached, SessionUnknown."""
        if self.trial is None or not life.enter():
            return ""
        try:
            return run_trial(life, self._control, self._storer, self._namespace, self.trial)
        finally:
            life.leave()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[Life | None]:
        """The session to use inside the block, or None when detached."""
        life = self._life
        if life is None or not life.enter():
            yield None
            return
        try:
            yield life
        finally:
            life.leave()

    # What needs no call.

    def lookup(self, keys: Sequence[BlockKey], first: tuple[bytes, bytes] | None = None) -> Found:
        """Find the longest cached prefix by binary search: about 11 probes for 1,563 blocks.

        Makes no call.

        Args:
            keys: of one prompt, first block first.
            first: origin and namespace digest of keys[0], if that is a first block and the miss
                shall say when it is cached under another namespace.
        """
        with self._entered() as life:
            if life is None:
                return Found(0, "self_test" if self._distrust else "detached", b"")
            blocks = life.index.longest_prefix(keys)
            reason = "" if blocks == len(keys) else life.index.miss_reason(keys[blocks])
            if reason == "never_stored" and not blocks and first is not None:
                reason = "namespace" if life.index.origins.elsewhere(*first) else reason
            return Found(blocks, reason, life.boot_epoch)

    def tiers(self, keys: Sequence[BlockKey]) -> tuple[str, ...]:
        """Where each block of the longest cached prefix is now, "dram" or "flash".

        One probe a block, about 1.5 us, so for blocks that are about to be loaded; makes no call.
        """
        with self._entered() as life:
            found: list[str] = []
            if life is not None:
                for key in keys[: life.index.longest_prefix(keys)]:
                    location = life.index.find(key)
                    if location is None:
                        break  # evicted since the search
                    found.append("dram" if location.dram is not None else "flash")
            return tuple(found)

    def touch(self, keys: Sequence[BlockKey], blocks: int, hint: Hint = NO_HINT) -> None:
        """Say that the first blocks were used; kept from eviction longer. Makes no call.

        Args:
            keys: of the prompt's full blocks.
            hint: what the request's sender says; of a request that found nothing it goes with
                the first block, which is stored later.
        """
        if blocks or (keys and hint != NO_HINT):
            kind, key = (TOUCH, keys[blocks - 1]) if blocks else (EXPECT, keys[0])
            with self._entered() as life:
                if life is not None:
                    life.push(kind, blocks, key, hint)

    def prefetch(self, keys: Sequence[BlockKey], blocks: int, follow: bool = False) -> None:
        """Ask for the first blocks to rise to DRAM; the sidecar is woken. Makes no call.

        follow: side by side, to be streamed meanwhile.
        """
        if blocks:
            with self._entered() as life:
                if life is not None:
                    life.push(FOLLOW if follow else PREFETCH, blocks, keys[blocks - 1])
                    self.bell_failures += not life.ring_bell()

    def risen(self, key: BlockKey) -> int | None:
        """Bytes of a block's record that can be streamed now; None if it is not on its way up."""
        with self._entered() as life:
            return None if life is None else risen(life, key)

    def count(
        self,
        requested_tokens: int,
        hits: Mapping[str, int],
        misses: Mapping[str, int],
        tenant: str = "",
    ) -> None:
        """Account for one request, once; makes no call. Kept for the next session when detached.

        Args:
            requested_tokens: of the prompt; tenant: whose, see proto.keys.tenant_of.
            hits: tier of TIERS -> tokens. misses: reason of MISS_REASONS -> tokens.
        """
        assert requested_tokens == sum(hits.values()) + sum(misses.values()), (
            requested_tokens, hits, misses,
        )  # fmt: skip
        with self._entered() as life:
            self._counting.add(life, tenant, requested_tokens, account(hits, misses))

    def measured(
        self, counts: Mapping[str, int], by_tenant: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Say what was measured since the last time, by name of COUNTERS, and of each tenant by
        name of TENANT_COUNTERS; makes no call, forgotten when detached."""
        with self._entered() as life:
            if life is not None:
                life.add(counts)
                for tenant, own in by_tenant.items():
                    life.add_for(tenant, 0, own)

    def claim(self, keys: Sequence[BlockKey]) -> None:
        """Say that these blocks are being computed here; who was granted them says claimant.

        Makes no call. A claim ends when the block is stored, by release, or with the session.
        """
        with self._entered() as life:
            if life is not None and keys:
                for key in keys:
                    life.push(CLAIM, 1, key)
                self.bell_failures += not life.ring_bell()

    def release(self, keys: Sequence[BlockKey]) -> None:
        """Say that these blocks will not come from here; makes no call."""
        with self._entered() as life:
            if life is not None:
                for key in keys:
                    life.push(RELEASE, 1, key)

    def claimant(self, key: BlockKey) -> Claimant:
        """Who is computing a block, "alone": there is nobody else to ask; no call, about 2 us."""
        with self._entered() as life:
            if life is None or life.index.sessions < 2:
                return "alone"
            owner = life.index.claims.owner(key)
            return "none" if not owner else "self" if owner == life.number else "other"

    def count_flight(self, tokens: int) -> None:
        """Account for a wait for another worker's blocks: tokens that came by it, 0 in vain."""
        outcome = "flights_got" if tokens else "flights_lost"
        self.measured({outcome: 1, "flight_tokens": tokens}, {})

    def show_rates(self, rates: Mapping[str, int]) -> None:
        """Say what was measured here, by name of RATES; makes no call, forgotten when detached."""
        with self._entered() as life:
            if life is not None:
                life.show(rates)

    def load(self, wanted: Wanted, out: Bytes | Target, deadline: float) -> str | None:
        """Copy a block out of the cache and verify it; blocks until it is there, makes no call.

        Args:
            wanted: what the block must be.
            out: as proto.slot.read_slot takes it, or a page of a device; undefined after a miss.
            deadline: until when to wait for a block that rises from flash, in time of now.

        Returns: None when out holds the block, else why not, one of MISS_REASONS.
        """
        life = self._life
        if life is None or not life.enter():  # without _entered: 3 us of a copy's 150
            return "detached"
        try:
            self.pace.before_load(wanted.payload_bytes)
            reason = load_block(life, wanted, out, deadline, self._now)
            if reason is None:
                life.add_one("loaded_bytes", wanted.payload_bytes)
            else:
                life.failed(reason, wanted.key)
            return reason
        finally:
            life.leave()

    def stream(self, load: LayerLoad) -> tuple[int, str]:
        """Copy blocks that are in DRAM, or rise, layer by layer and verify them; makes no call.

        Returns: leading blocks that came, and why no more, one of MISS_REASONS, "" when all did.
        """
        with self._entered() as life:
            if life is None:
                return 0, "detached"
            blocks, reason = stream_blocks(life, load, self.pace, self._now)
            life.add_one("loaded_bytes", sum(one.payload_bytes for one in load.wanted[:blocks]))
            if reason:
                life.failed(reason, load.wanted[blocks].key)
            return blocks, reason

    # What needs a call.

    def store(self, items: Sequence[StoreItem]) -> StoreResult:
        """Copy blocks into the cache: a Reserve and a Commit for each 48 MiB of new blocks.

        Args:
            items: parents before their children.
        """
        with self._entered() as life:
            return self._storer.store(life, items, self.pace)

    def clear(self) -> int:
        """Drop this namespace's blocks; how many. On the thread that stores. Raises: Detached."""
        return self._storer.clear(self._life, self._namespace.digest())


def open_cache(
    address: str,
    namespace: Namespace,
    name: str,
    log: Log,
    trial: TrialPage | None = None,
    model: str = "",
) -> CacheClient:
    """Start a client of a sidecar on this host.

    Args:
        address: unix:PATH or PATH of the sidecar's socket.
        trial, model: see CacheClient.

    Raises:
        ConfigInvalid: the address is of another host, or none at all.
    """
    client = CacheClient(GrpcControl(local_address(address)), namespace, name, log)
    client.trial, client.model = trial, model
    client.start()
    return client
