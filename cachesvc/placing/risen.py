"""What came up from flash: whether it is the block that was asked for."""

from __future__ import annotations

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.flash.flashio import Rise
from kvist.cachesvc.placing.placement import Placement
from kvist.proto.errors import BlockCorrupt
from kvist.proto.keys import NO_KEY


def check_risen(job: Rise, placement: Placement) -> None:
    """Compare what a record said with what is known of its block.

    Raises: why the block could not be read, or BlockCorrupt: it is another one.
    """
    blocks, index, header = placement.blocks, placement.index, job.header
    if job.problem is not None:
        raise job.problem
    assert header is not None
    parent = blocks.parent[job.row]
    is_it = (
        header.key == job.key
        and header.parent == (NO_KEY if parent == NO_ROW else index.key(parent))
        and header.namespace == blocks.namespace(job.row)
        and header.depth == blocks.depth[job.row]
    )
    if not is_it:
        raise BlockCorrupt("the slot holds another block")
