"""What a store is made of as soon as the size of a slot is known, and how it is put together."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvist.cachesvc.catalog.index import IndexWriter
from kvist.cachesvc.core.claims import Claims
from kvist.cachesvc.core.host import Host
from kvist.cachesvc.core.intake import Intake
from kvist.cachesvc.core.sessions import RING_PREFIX, Sessions
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.tiers import TierEvents
from kvist.cachesvc.flash.budget import AdmissionMode, WearBook, WriteBudget
from kvist.cachesvc.flash.flashio import Post
from kvist.cachesvc.log import Log
from kvist.cachesvc.placing.admission import Admission
from kvist.cachesvc.placing.expiry import Expiry
from kvist.cachesvc.placing.moves import Moves
from kvist.cachesvc.placing.pins import BUDGET_SHARE, Pins
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.placing.tenancy import Limits, Tenancy
from kvist.cachesvc.placing.wards import Rules
from kvist.cachesvc.policy.eviction import History, Policy, PolicyName, Tree
from kvist.cachesvc.policy.rgg import make_policy
from kvist.proto.errors import KvistError, TierOffline
from kvist.proto.verify import Verify
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_folder import FlashPlan

INDEX_NAME = "index"
ARENA_NAME = "arena"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store is told.

    Attributes:
        run_dir: folder of the bell and of the lock that keeps a second sidecar out.
        shm_dir: folder of the index, the arena and the rings, best on a tmpfs. Files of these
            names that an earlier life left in it are removed.
        dram_bytes: of the arena.
        flash_path: folder of the flash tier; None is none.
        flash_bytes: of its slots.
        slot_bytes: of a slot in both tiers; None takes it from the flash folder, or else from
            the first worker that attaches.
        flash_admission: what sinks, see cachesvc/placing/admission.py.
        flash_write_bytes_per_day: None is no limit. flash_write_burst_bytes: None is an hour's.
        io_threads: that read and write flash.
        flash_queue_blocks: blocks that may wait to sink.
        tenants: rules of what a tenant may have, see cachesvc/placing/tenancy.py.
        pin_bytes: of blocks that may be pinned at once; None is a quarter of dram_bytes.
        reservation_share: of the DRAM slots, that one session may hold reserved.
        eviction: policy by which blocks go from either tier.
        dram_verify, flash_verify: what of a payload is checked, see proto/verify.py.
        show_tokens: the page may show token ids of prompts.
        journal: where what comes to the tiers and goes is written down for cachesvc.events; None:
            nowhere.
        dram_nodes: NUMA nodes whose memory the arena is made of, see proto/numa.py; none: any.
        prefault: touch the arena's memory in the background, so that no copy waits for it.
    """

    run_dir: Path
    shm_dir: Path
    dram_bytes: int
    flash_path: Path | None = None
    flash_bytes: int = 0
    slot_bytes: int | None = None
    flash_admission: AdmissionMode = "second_use"
    flash_write_bytes_per_day: int | None = None
    flash_write_burst_bytes: int | None = None
    io_threads: int = 2
    flash_queue_blocks: int = 256
    tenants: Mapping[str, Limits] = field(default_factory=dict)
    pin_bytes: int | None = None
    reservation_share: float = 0.25
    eviction: PolicyName = "rgg"
    show_tokens: bool = False
    journal: Journal | None = None
    dram_nodes: tuple[int, ...] = ()
    prefault: bool = True
    dram_verify: Verify = "always"
    flash_verify: Verify = "always"


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one life; reservation_limit is in slots of one session."""

    index: IndexWriter
    dram: DramTier
    flash: FlashTier | None
    placement: Placement
    moves: Moves
    admission: Admission
    expiry: Expiry
    intake: Intake
    claims: Claims
    reservation_limit: int
    log: Log


class Maker:
    """Makes the parts; undo gets what ends them, in the right order.

    Attributes:
        failure: why the flash folder could not be opened, in words; "" when it could.

    Args:
        config: of the store. post: runs a callable on the store's thread. now: seconds.
        host: threads and disk.
    """

    def __init__(
        self,
        config: StoreConfig,
        post: Post,
        now: Callable[[], float],
        log: Log,
        undo: ExitStack,
        host: Host,
    ) -> None:
        self.failure = ""
        self._config = config
        self._post = post
        self._now = now
        self._log = log
        self._undo = undo
        self._host = host

    def make(self, slot_bytes: int | None, boot_epoch: bytes, sessions: Sessions) -> Parts | None:
        """Arena, flash tier, index and everything on top.

        Args:
            slot_bytes: None takes it from the flash folder.

        Returns: None when the size of slots is still open.

        Raises:
            ConfigInvalid: dram_bytes makes no arena, or shm_dir cannot hold it; or see
                FlashTier.open. FormatRefused: see FlashTier.open. A flash folder that cannot be
                used now is no error.
        """
        config, undo = self._config, self._undo
        flash = None
        if config.slot_bytes is None:  # what a folder has comes before what a worker needs
            flash = self._open_flash(None)
            slot_bytes = flash.slot_bytes if flash else slot_bytes
        if slot_bytes is None:
            return None
        slots = config.dram_bytes // slot_bytes
        dram = DramTier(config.shm_dir / ARENA_NAME, slots, slot_bytes, config.dram_nodes)
        undo.callback(dram.close)
        # After the arena: a size that makes none must not format the folder.
        flash = flash or self._open_flash(slot_bytes)
        flash_slots = flash.slots if flash else 0
        path = config.shm_dir / INDEX_NAME
        index = IndexWriter(path, slots, flash_slots, slot_bytes, boot_epoch)
        undo.callback(path.unlink, missing_ok=True)
        undo.callback(index.close)
        index.set_dram_verify(config.dram_verify)
        placement = self._placement(index, dram, flash, sessions)
        if config.show_tokens:
            placement.hottest.tokens_of = partial(_tokens_of, index, dram)
        moves = self._moves(placement)
        share = max(1, int(slots * config.reservation_share))
        claims = Claims(index.claims)
        admission = self._admission(placement, moves)
        expiry = Expiry(placement, self._now)
        intake = Intake(placement, admission, expiry, sessions, claims, share)
        self._begin(placement, moves, admission, sessions)
        return Parts(
            index, dram, flash, placement, moves, admission, expiry, intake, claims, share,
            self._log,
        )  # fmt: skip

    def _begin(
        self, placement: Placement, moves: Moves, admission: Admission, sessions: Sessions
    ) -> None:
        """Take over what is on flash, touch the arena, say what there is."""
        if self._config.journal is not None:
            events = TierEvents(placement, sessions, self._config.journal)
            self._undo.callback(events.close)
        moves.start(admission.open_book)
        if placement.flash is not None and not placement.flash.failure:
            admission.open_book()
        if self._config.prefault:
            self._prefault(placement.dram)
        self._say_ready(placement, moves)

    def _placement(
        self, index: IndexWriter, dram: DramTier, flash: FlashTier | None, sessions: Sessions
    ) -> Placement:
        config = self._config
        make_policy = partial(self._make_policy, seed=int.from_bytes(index.boot_epoch))
        pin_bytes = config.pin_bytes or config.dram_bytes // BUDGET_SHARE
        pins = Pins(index.rows, pin_bytes // dram.slot_bytes, self._now)
        rules = Rules(Tenancy(config.tenants), pins)
        return Placement(index, dram, flash, make_policy, sessions.is_awaited, self._now, rules)

    def _moves(self, placement: Placement) -> Moves:
        config = self._config
        moves = Moves(
            placement, self._host.threads, config.io_threads, config.flash_queue_blocks,
            self._post, self._log,
        )  # fmt: skip
        self._undo.callback(moves.close)
        return moves

    def _admission(self, placement: Placement, moves: Moves) -> Admission:
        config = self._config
        budget = WriteBudget(
            config.flash_write_bytes_per_day, config.flash_write_burst_bytes, self._now
        )
        book = None
        if placement.flash is not None and config.flash_path is not None:
            book = WearBook(config.flash_path)
        admission = Admission(placement, moves, config.flash_admission, budget, book)
        self._undo.callback(admission.close)
        return admission

    def _make_policy(self, tree: Tree, history: History, capacity: int, seed: int) -> Policy:
        return make_policy(self._config.eviction, tree, history, capacity, seed)

    def _say_ready(self, placement: Placement, moves: Moves) -> None:
        flash, dram = placement.flash, placement.dram
        self._log.info(
            "store ready", slot_bytes=dram.slot_bytes, dram_slots=dram.slots, flash=moves.state,
            flash_slots=flash.slots if flash else 0, blocks=len(placement.blocks),
            flash_io=("direct" if flash.direct else "buffered") if flash else "off",
            dram_verify=self._config.dram_verify, flash_verify=self._config.flash_verify,
        )  # fmt: skip

    def _open_flash(self, slot_bytes: int | None) -> FlashTier | None:
        """The flash tier; one that is failed where its folder cannot be opened now.

        None: there is to be none, or the size of its slots is still open: the folder is new, or
        (see failure) cannot be read now.
        """
        path, capacity_bytes = self._config.flash_path, self._config.flash_bytes
        self.failure = ""
        if path is None:
            return None
        try:
            flash = FlashTier.open(path, capacity_bytes, slot_bytes, self._host.disk)
        except TierOffline as error:
            self.failure = str(error)
            if slot_bytes is None:
                return None
            plan = FlashPlan(path, capacity_bytes, self._host.disk)
            flash = FlashTier.closed(plan, slot_bytes, self.failure)
        if flash is not None:
            self._undo.callback(flash.close)
            flash.set_verify(self._config.flash_verify)
        return flash

    def _prefault(self, dram: DramTier) -> None:
        stop = threading.Event()

        def prefault() -> None:
            whole = dram.prefault(stop)
            self._log.info(
                "arena populated" if whole else "arena not populated", pages=dram.pages,
                huge_bytes=dram.huge_bytes, bytes=dram.slots * dram.slot_bytes,
                nodes=" ".join(f"{node}:{held}" for node, held in sorted(dram.node_bytes.items()))
                or "unknown",
            )  # fmt: skip

        if dram.unplaced:
            nodes = ",".join(map(str, self._config.dram_nodes))
            self._log.warning("arena not placed", nodes=nodes, reason=dram.unplaced)
        thread = threading.Thread(target=prefault, name="kvist-prefault", daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(stop.set)


def _tokens_of(index: IndexWriter, dram: DramTier, row: int) -> tuple[int, ...]:
    """Token ids of the block in a row; () when it is not in DRAM."""
    slot = index.dram(row)
    if slot is None:
        return ()
    try:
        tokens = dram.header(slot).tokens
    except KvistError:
        return ()
    return struct.unpack(f"<{len(tokens) // 4}I", tokens)


def sweep(folder: Path) -> None:
    """Remove what an earlier life left; its workers keep the memory that they have mapped."""
    for path in (folder / INDEX_NAME, folder / ARENA_NAME, *folder.glob(f"{RING_PREFIX}*")):
        path.unlink(missing_ok=True)
