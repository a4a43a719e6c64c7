"""The GGUF container of llama.cpp: metadata and where each tensor's bytes are.

Little-endian throughout: magic "GGUF", u32 version (2 or 3), u64 tensor count, u64 metadata count,
the metadata (string key, u32 type, value), then per tensor: string name, u32 dimensions, u64 each
(innermost first), u32 type, u64 offset into the data, which begins at the next multiple of
general.alignment (32 if unsaid). A string is a u64 length and UTF-8; an array is a u32 type, a u64
length and its values.

The gguf package reads the same, but takes 4 s for the 98,000 strings of a vocabulary of 49,152, as
it makes several arrays per string; this takes a tenth of a second.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from kvist.engine.models.files import ModelFilesError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's bytes in the file.

    Attributes:
        kind: how they are encoded.
        data: (..., row bytes) as uint8, or float32 or float16 values; read-only, mapped.
    """

    kind: gguf.GGMLQuantizationType
    data: npt.NDArray[Any]


class GgufFile:
    """A mapped GGUF file.

    Attributes:
        metadata: key -> number, bool, str, or list of these.
        tensors: by the file's own names.

    Raises:
        ModelFilesError: it is not a GGUF file of a known version, or it is cut short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
            self._at = 0
            self._buffer = self._data.data
            self.metadata, self.tensors = self._read()
        except (OSError, struct.error, ValueError) as error:
            # numpy's memmap says ValueError for an empty file.
            raise ModelFilesError(f"{path}: is not a whole GGUF file: {error}") from error

    def _read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic = bytes(self._buffer[:4])
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
        self._at = 4
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        tensors, fields = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(fields):
            name = self._string()
            metadata[name] = self._value(self._scalar("<I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 0)) or DEFAULT_ALIGNMENT
        start = -(-self._at // alignment) * alignment
        return metadata, {name: self._tensor(start, *place) for name, place in infos}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._buffer, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self._at + length
        if end > len(self._buffer):
            raise ValueError("a string goes past the end")
        text = bytes(self._buffer[self._at : end]).decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, length = self._scalar("<I"), self._scalar("<Q")
            if length > len(self._buffer):
                raise ValueError("an array goes past the end")
            return [self._value(inner) for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        return self._scalar(SCALARS[kind])

    def _info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._string()
        shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))
        return name, (shape[::-1], self._scalar("<I"), self._scalar("<Q"))

    def _tensor(self, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        encoding = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
        if not shape or shape[-1] % block:
            raise ValueError(f"a {encoding.name} tensor has shape {shape}")
        rows = (*shape[:-1], shape[-1] // block * block_bytes)
        first, length = start + offset, math.prod(rows)
        if first + length > len(self._data):
            raise ValueError("a tensor goes past the end")
        data: npt.NDArray[Any] = self._data[first : first + length].reshape(rows)
        if encoding == gguf.GGMLQuantizationType.F32:
            data = data.view(np.float32)
        elif encoding == gguf.GGMLQuantizationType.F16:
            data = data.view(np.float16)
        return GgufTensor(encoding, data)


def eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an output: of a text, and of a turn where that is another one."""
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(sorted({int(metadata[name]) for name in names if name in metadata}))
