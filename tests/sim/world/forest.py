"""The blocks of the world: few and small, in two namespaces, with trunks and branches."""

from __future__ import annotations

from collections.abc import Mapping

from kvist.cachesvc.placing.tenancy import NAMESPACE_PREFIX, Limits
from kvist.cachesvc.worker.storing import StoreItem
from kvist.proto.keys import BlockKey, Namespace
from kvist.proto.layout import BlockFormat
from kvist.proto.record import PAGE_BYTES, RecordShape
from sim.blocks import Block, number_of
from sim.stores import tree_block

BLOCK_TOKENS = 4
FORMAT = BlockFormat(2, 1, 128, "float32", BLOCK_TOKENS)
SPACES = [Namespace("sim", FORMAT, "none", "none", salt=salt) for salt in ("", "other")]
DIGESTS = [space.digest() for space in SPACES]
SHAPE = RecordShape(FORMAT.payload_bytes, BLOCK_TOKENS)
SLOT_BYTES = SHAPE.record_bytes
# Header, and a page for each of two layers: as many parts has a rise that is followed.
LAYER_BYTES = FORMAT.payload_bytes // FORMAT.layers
assert LAYER_BYTES == PAGE_BYTES
assert SLOT_BYTES == 3 * PAGE_BYTES

# number -> number of the block before, or None. The second tree is of the other namespace.
PARENTS: dict[int, int | None] = {
    0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 1, 7: 6, 8: 7, 9: 3, 10: None, 11: 10,
    12: None, 13: 12, 14: 13, 15: 14, 16: 13, 17: 12,
}  # fmt: skip
OTHER_FROM = 12


def _space(number: int) -> int:
    return int(number >= OTHER_FROM)


FOREST: list[Block] = []
for _number, _parent in PARENTS.items():
    FOREST.append(
        tree_block(
            _number, None if _parent is None else FOREST[_parent], DIGESTS[_space(_number)], SHAPE
        )
    )
BLOCKS: dict[BlockKey, Block] = {block.header.key: block for block in FOREST}
PAYLOADS: dict[BlockKey, bytes] = {key: block.payload.tobytes() for key, block in BLOCKS.items()}
IN_SPACE = [
    [number for number in PARENTS if _space(number) == space] for space in range(len(SPACES))
]


def path_to(number: int) -> list[Block]:
    """A block and all before it, first block first."""
    path: list[Block] = []
    at: int | None = number
    while at is not None:
        path.append(FOREST[at])
        at = PARENTS[at]
    return path[::-1]


PATHS = {number: path_to(number) for number in PARENTS}
KEYS = {number: [block.header.key for block in path] for number, path in PATHS.items()}


def item_of(block: Block) -> StoreItem:
    """A block as a client stores it."""
    header = block.header
    return StoreItem(
        header.key, header.parent, header.namespace, header.depth, header.tokens, block.payload
    )


# A block's key and those before it.
LINES: dict[BlockKey, list[BlockKey]] = {keys[-1]: keys for keys in KEYS.values()}
ITEMS = {number: [item_of(block) for block in path] for number, path in PATHS.items()}


def name_of(key: bytes) -> str:
    """A block for the trace."""
    return f"b{number_of(key)}"


# For the namespace of the second tree; the first one's blocks nobody limits.
_SECOND = f"{NAMESPACE_PREFIX}{DIGESTS[1].hex()[:16]}"
NO_RULES: Mapping[str, Limits] = {}
RULES: tuple[Mapping[str, Limits], ...] = (
    {_SECOND: Limits(quota=SLOT_BYTES, flash_quota=2 * SLOT_BYTES)},
    {_SECOND: Limits(floor=SLOT_BYTES, flash_floor=SLOT_BYTES)},
    {_SECOND: Limits(ttl=2)},
    NO_RULES,
    NO_RULES,
)
