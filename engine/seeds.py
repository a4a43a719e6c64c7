"""Seeds that follow from what is asked, not from who else asks."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from kvist.engine.request import NewRequest, SamplingParams


class ContentSeeds:
    """Gives each request without a seed one that its content decides.

    Args:
        seed: of the engine; another one gives other answers.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def seeded(self, request: NewRequest) -> SamplingParams:
        """The request's parameters with a seed: its own, or a hash of its prompt and parameters.

        Returns:
            parameters whose seed is not None. Requests that are equal but for their ids get equal
            seeds; the answers to one prompt (`n`) differ by SamplingParams.choice.
        """
        if request.params.seed is not None:
            return request.params
        digest = hashlib.sha256(self._seed.to_bytes(8, "little"))
        digest.update(msgspec.msgpack.encode(request.params))
        digest.update(np.asarray(request.prompt, dtype="<u4").tobytes())
        seed = int.from_bytes(digest.digest()[:8], "little", signed=True)
        return msgspec.structs.replace(request.params, seed=seed)
