"""What pages may hold K and V in: the names of --kv-cache-dtype, its scale, and their flags."""

from __future__ import annotations

import argparse

from kvist.proto.errors import ConfigInvalid

# vLLM's names, and what torch calls them.
KV_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}
SCALE_MIN, SCALE_MAX = 2.0**-16, 2.0**16


def is_float8(kv_cache_dtype: str) -> bool:
    """Whether a checked --kv-cache-dtype is float8, the only one with a scale."""
    return KV_DTYPES[kv_cache_dtype] == "float8_e4m3fn"


def check_kv_dtype(kv_cache_dtype: str, scale: float) -> None:
    """Raises ConfigInvalid when there is no such dtype, or the scale is not for it."""
    if kv_cache_dtype not in KV_DTYPES:
        raise ConfigInvalid(
            f"--kv-cache-dtype: {kv_cache_dtype!r} is not one of {', '.join(KV_DTYPES)}"
        )
    if not SCALE_MIN <= scale <= SCALE_MAX:
        raise ConfigInvalid(
            f"--kv-cache-scale: {scale} is out of range; give {SCALE_MIN} to {SCALE_MAX}"
        )
    if scale != 1 and not is_float8(kv_cache_dtype):
        raise ConfigInvalid(
            f"--kv-cache-scale: {scale} is for --kv-cache-dtype fp8, other dtypes have none; "
            "leave it out"
        )


def add_kv_dtype_flags(
    group: argparse._ActionsContainer, dtype: str | None = None, scale: float | None = None
) -> None:
    """Add both flags with these defaults; the first has vLLM's name and values."""
    shown = "" if dtype is None else " (%(default)s)"
    group.add_argument(
        "--kv-cache-dtype",
        default=dtype,
        metavar="DTYPE",
        help=f"of K and V in every tier: {', '.join(KV_DTYPES)}. fp8, which is fp8_e4m3, takes "
        "half the bytes of bfloat16, on CUDA devices only; kvist eval says what it costs in "
        f"accuracy{shown}",
    )
    group.add_argument(
        "--kv-cache-scale",
        type=_scale,
        default=scale,
        metavar="FLOAT",
        help="what fp8 numbers are multiplied by, best a power of two; engines with other scales "
        "share no blocks. Give more than 1 where K or V pass 448, less where many are below 1/64: "
        f"kvist eval says how many{shown}",
    )


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
