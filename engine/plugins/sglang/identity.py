"""What SGLang's pages are interchangeable with: the namespace, and what is not served at all."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvist.engine.plugins.common import (
    IDENTITY_BYTES,
    digest_text,
    model_folder,
    opaque_format,
)
from kvist.engine.plugins.sglang.memory import PageMemory
from kvist.engine.plugins.vllm.identity import files_fingerprint, has_files
from kvist.proto.keys import Namespace

SUPPORTED = ("0.5.23",)
"""Releases of SGLang whose interface this plugin was tested with."""

ADDRESS = "kvist.cache"
MODEL = "kvist.model"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
MODEL_SUFFIXES = (*WEIGHT_SUFFIXES, ".json")
ADAPTER_SUFFIXES = (".safetensors", ".bin", ".json", ".pt")

# Of SGLang's own arguments, what changes the numbers in a page beside the weights.
_ARGUMENTS = (
    "dtype", "quantization", "kv_cache_dtype", "quantization_param_path", "attention_backend",
    "prefill_attention_backend", "json_model_override_args", "load_format", "revision",
    "speculative_algorithm", "speculative_draft_model_path", "context_length",
    "model_loader_extra_config", "mm_process_config",
)  # fmt: skip


def settings_of(config: Any) -> dict[str, Any]:
    """Raises: ValueError: a setting is missing or wrong; the message says which and the fix."""
    extra = dict(config.extra_config or {})
    if not extra.get(ADDRESS):
        raise ValueError(
            f'KvistStorage: "{ADDRESS}" is missing in --hicache-storage-backend-extra-config; '
            "give the path of the sidecar's socket, like /run/kvist/kvistd.sock"
        )
    if config.attn_cp_size != 1:
        raise ValueError("KvistStorage: attention context parallelism is not served yet")
    if config.should_split_heads:
        raise ValueError("KvistStorage: pages split by heads are not served; drop tp_lcm_size")
    return extra


def page_identity(key: str) -> bytes:
    """The hash that SGLang names a page by, IDENTITY_BYTES long.

    It is a SHA-256 of the page's tokens and the hash of the page before it, the first one of the
    request's salt and adapter: equal hashes are equal prefixes. Other strings are hashed.
    """
    if len(key) == 2 * IDENTITY_BYTES:
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return hashlib.sha256(b"kvist.sglang.key" + key.encode()).digest()


def model_name(settings: dict[str, Any], arguments: Any | None) -> str:
    """Fingerprint of the model: by content, unless the operator vouches for a name of it.

    Args:
        arguments: SGLang's ServerArgs; None when there are none.

    Raises: ValueError: neither is there, or weights come from elsewhere than the model's folder.
    """
    if settings.get(MODEL):
        return digest_text("named", str(settings[MODEL]))
    if arguments is None:
        raise ValueError(
            f'KvistStorage: SGLang does not say which model it runs; give "{MODEL}", a name that '
            "no other weights have, in --hicache-storage-backend-extra-config"
        )
    path = str(arguments.model_path)
    folder = model_folder(path, getattr(arguments, "revision", None))
    weights = path if folder is None else files_fingerprint(folder, MODEL_SUFFIXES)
    if folder is not None and not has_files(folder, WEIGHT_SUFFIXES):
        # Two fine-tunes of one configuration would have one name.
        raise ValueError(
            f'KvistStorage: {folder} has no weights to know the model by; give "{MODEL}", a name '
            "that no other weights have, in --hicache-storage-backend-extra-config"
        )
    return digest_text("content", weights, *_adapters(arguments))


def _adapters(arguments: Any) -> list[str]:
    """LoRA adapters given at start, by content: SGLang's hashes know only their names and paths.

    Those that are loaded later get a name of their own from SGLang each time.
    """
    found = []
    for adapter in getattr(arguments, "lora_paths", None) or []:
        name, path = str(getattr(adapter, "lora_name", "")), str(getattr(adapter, "lora_path", ""))
        folder = model_folder(path, None) if path else None
        content = files_fingerprint(folder, ADAPTER_SUFFIXES) if folder else "unknown"
        found.append(f"{name}={path}={content}")
    return sorted(found)


def namespace_of(
    config: Any, pool: Any, pool_name: str, memory: PageMemory, model: str, words: dict[str, str]
) -> Namespace:
    """The namespace of one pool's pages.

    Args:
        config: HiCacheStorageConfig. pool: HostKVCache. pool_name: SGLang's name of it.
        model: see model_name. words: more that sets pages apart.

    Raises: ValueError: pages of a size that is not served.
    """
    geometry = (
        "layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim",
        "kv_cache_dim", "kv_lora_rank", "qk_rope_head_dim", "size_per_token",
    )  # fmt: skip
    all_words = {
        **words,
        "torch": torch.__version__,
        "pool": f"{pool_name}:{type(pool).__name__}",
        "tag": str(getattr(pool, "storage_format_tag", None)),
        "layout": str(pool.layout),
        "dtype": str(pool.dtype).removeprefix("torch."),
        "page": f"{pool.page_size}:{memory.rows}x{memory.row_bytes}",
        "geometry": ",".join(f"{name}={getattr(pool, name, None)}" for name in geometry),
        "rank": _rank(config, pool, pool_name),
    }
    return Namespace(
        model=model,
        format=opaque_format(memory.payload_bytes, pool.page_size),
        rope="in the model's configuration",
        compute=" ".join(f"{name}={value}" for name, value in all_words.items()),
    )


def _rank(config: Any, pool: Any, pool_name: str) -> str:
    """Which part of the model a rank's pages are; every rank of an MLA model has the same."""
    is_shared = config.is_mla_model and pool_name != "mamba" and not hasattr(pool, "head_num")
    part = "all" if is_shared else f"{config.tp_rank}of{config.tp_size}"
    return f"tp{part}/pp{config.pp_rank}of{config.pp_size}"


def argument_words(arguments: Any | None) -> dict[str, str]:
    """SGLang's arguments that change the numbers in a page."""
    if arguments is None:
        return {}
    said = {name: str(getattr(arguments, name, None)) for name in _ARGUMENTS}
    # Long ones would not fit into what the sidecar logs of a namespace.
    return {name: text if len(text) <= 64 else digest_text(text) for name, text in said.items()}


def sglang_arguments() -> Any | None:
    """SGLang's ServerArgs in this process; None outside of its scheduler."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return get_server_args()
    except ValueError:  # not published
        return None
