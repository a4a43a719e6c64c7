"""How much of what a tier gives out is checked: always, sampled or off; and where less is safe.

What is always compared, whatever the setting: key, namespace, tokens, length, the header's own
checksum, and the slot's generation before and after the copy. The setting is about the payload's
checksum: 0.3 to 0.55 of a memcpy for each block that is read from DRAM, and as much for each that
is stored unless it is "off".

    always     each payload that is read is summed and compared
    sampled    each payload is summed when it is stored, and one read in SAMPLE_EVERY compared
    off        nothing is summed in DRAM; a record gets its sum when it leaves for flash or a stream

Without the sum, a copy out of shared memory is only as good as the generation's two looks at it,
and these prove something only where the processor keeps the order of stores and of loads (x86;
docs/architecture.md has the argument). Elsewhere the sum is the fence, and only "always" will do.
"""

from __future__ import annotations

import itertools
import platform
from typing import Final, Literal, get_args

from kvist.proto.errors import ConfigInvalid

Verify = Literal["always", "sampled", "off"]
VERIFY: Final[tuple[Verify, ...]] = get_args(Verify)
"""The order is that of the numbers in shared memory."""

SAMPLE_EVERY = 16
_KEEP_ORDER = ("x86_64", "AMD64", "i386", "i686")


class Verifier:
    """Says for each read whether its payload is summed. Threads may share one.

    Attributes:
        mode: the setting.
        sums: whether who stores a block sums it.
    """

    def __init__(self, mode: Verify) -> None:
        self.mode = mode
        self.sums = mode != "off"
        self._reads = itertools.count()

    def wanted(self) -> bool:
        """Whether this read is compared."""
        if self.mode == "sampled":
            return next(self._reads) % SAMPLE_EVERY == 0
        return self.mode == "always"


def keeps_order(machine: str) -> bool:
    """Whether a processor does loads and stores in the order of the program, as far as others can
    tell; machine is as platform.machine says it."""
    return machine in _KEEP_ORDER


def checked_dram_verify(mode: Verify, machine: str | None = None) -> Verify:
    """The setting for DRAM, if this processor can live with it.

    Args:
        machine: as platform.machine says it; None asks.

    Raises:
        ConfigInvalid: the processor may reorder loads or stores, and the sum is the only fence.
    """
    machine = platform.machine() if machine is None else machine
    if mode != "always" and not keeps_order(machine):
        raise ConfigInvalid(
            f"dram_verify: {mode} needs a processor that keeps the order of memory accesses (x86);"
            f" this is {machine or 'unknown'}, where the checksum is the fence: set always"
        )
    return mode
