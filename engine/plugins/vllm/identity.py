"""What vLLM's KV bytes are interchangeable with: the namespace, and what is not served at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvist.proto.keys import Namespace
from kvist.proto.layout import DTYPE_BYTES, BlockFormat

SUPPORTED = ("0.32",)
"""Releases of vLLM whose interface this plugin was tested with."""

ADDRESS = "kvist.cache"
"""The one setting in kv_connector_extra_config."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_CHUNK_BYTES = 8 << 20


def check_version(version: str) -> None:
    """Raises: RuntimeError: a release of vLLM that this plugin was not tested with."""
    if not any(version == one or version.startswith(f"{one}.") for one in SUPPORTED):
        raise RuntimeError(
            f"KvistConnector is tested with vLLM {', '.join(SUPPORTED)}; this is vLLM {version}, "
            "whose connector interface may differ. Install one of these releases, or a release of "
            "Kvist that names yours"
        )


def unknown_settings(extra: Mapping[str, Any]) -> list[str]:
    """Settings that are meant for this plugin and that it does not have, like misspelt ones."""
    return sorted(name for name in extra if name.startswith("kvist") and name != ADDRESS)


def refusal(config: Any, kv: Any) -> str:
    """Why this setup of vLLM is not served, with the way out; "" when it is.

    Args:
        config: VllmConfig. kv: KVCacheConfig.
    """
    parallel = config.parallel_config
    for name in (
        "pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
    ):  # fmt: skip
        if getattr(parallel, name) != 1:
            return f"{name}={getattr(parallel, name)} is not served yet; set 1"
    if config.speculative_config is not None:
        return "speculative decoding is not served yet; remove --speculative-config"
    if getattr(config.cache_config, "calculate_kv_scales", False):
        return "KV scales that are found at run time make blocks of two runs differ"
    return _memory_refusal(kv)


def _memory_refusal(kv: Any) -> str:
    kinds = [type(group.kv_cache_spec).__name__ for group in kv.kv_cache_groups]
    if kinds != ["FullAttentionSpec"]:
        return (
            f"a model with KV groups {kinds or 'none'} is not served; one group of full attention "
            "is (hybrid models need more than the blocks of one prefix)"
        )
    spec = kv.kv_cache_groups[0].kv_cache_spec
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or spec.kv_quant_mode.name != "NONE":
        return f"KV of dtype {dtype}/{spec.kv_quant_mode.name} is not served; set kv_cache_dtype"
    content = 2 * spec.head_size * DTYPE_BYTES[dtype]
    if spec.head_size_v != spec.head_size or spec.state_content_size_bytes != content:
        return "KV whose K and V are of different sizes is not served"
    if spec.page_size_bytes != spec.num_heads * spec.block_size * content:
        return "KV pages with padding or more than one token a state are not served"
    return ""


def namespace_of(
    config: Any, kv: Any, layers: Sequence[Any], vllm_version: str, rank: int
) -> Namespace:
    """The namespace of a worker's blocks.

    A block's bytes are vLLM's own: how K and V lie inside it depends on its release, its attention
    backend and the processor, so all of these are in it. The format only says how many bytes.

    Args:
        config: VllmConfig, with which refusal found nothing wrong.
        kv: KVCacheConfig.
        layers: vLLM's attention layer objects, in the order of the placement.
        rank: of the worker in its tensor-parallel group.
    """
    spec = kv.kv_cache_groups[0].kv_cache_spec
    backends = sorted({_backend(layer) for layer in layers})
    names = kv.kv_cache_tensors[0].layers
    ranks = config.parallel_config.tensor_parallel_size
    words = {
        "engine": f"vllm-{vllm_version}/torch-{torch.__version__}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "attention": "+".join(backends),
        "layout": str(kv.kv_cache_layout),
        "page": f"{spec.num_heads}x{spec.block_size}x{spec.head_size}x2",
        "window": str(spec.sliding_window or spec.attention_chunk_size),
        "layers": _digest(*names),
        "dtype": str(config.model_config.dtype),
        "kv_dtype": str(config.cache_config.cache_dtype),
        "compiled": str(getattr(config.compilation_config.mode, "name", "NONE")),
        "positions": positions(config.model_config),
        "rank": f"tp{rank}of{ranks}/pp0of1",
        "heads": head_range(config.model_config.get_total_num_kv_heads(), rank, ranks),
    }
    return Namespace(
        model=model_name(config),
        format=BlockFormat(
            len(names), spec.num_heads, spec.head_size, str(spec.dtype).removeprefix("torch."),
            spec.block_size,
        ),
        rope="in the model's configuration",
        compute=" ".join(f"{name}={value}" for name, value in words.items()),
    )  # fmt: skip


def tier_namespace(
    spec: Any, row_bytes: int, model: str, vllm_version: str, device: str
) -> Namespace:
    """The namespace of the chunks of vLLM's own offloading, which hold the blocks of all workers.

    Args:
        spec: vLLM's OffloadingSpec. row_bytes: of a chunk.
        model: what the user says of the model, or "". device: what computes, in words.

    Raises: ValueError when it is not known what the model is, or chunks are of several sizes.
    """
    config = spec.config
    name = config.model.name
    folder = Path(name)
    if not model and not (folder.is_dir() and has_files(folder, WEIGHT_SUFFIXES)):
        raise ValueError(
            f'the tier cannot see what {name} is: put "model" into its configuration, words that '
            "change when the weights do, or give vLLM the model as a folder with its weights"
        )
    sizes = {tokens * spec.blocks_per_chunk for tokens in spec.tokens_per_block}
    (tokens,) = sizes if len(sizes) == 1 else (0,)
    if not tokens or row_bytes % (4 * tokens):
        raise ValueError(
            f"chunks of {sorted(sizes)} tokens and {row_bytes} bytes are not served: one size for "
            "all KV groups is, of whole bytes a token"
        )
    words = {
        "engine": f"vllm-{vllm_version}/torch-{torch.__version__}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "dtype": config.model.dtype,
        "groups": _digest(repr(config.groups)),
        "layout": f"{config.kv_cache_layout}/{config.canonical_layout}/{config.replicated_layout}",
        "ranks": repr(
            tuple(
                getattr(config.parallel, f"{axis}_size")
                for axis in ("world", "tp", "pp", "pcp", "dcp")
            )
        ),
    }
    content = "" if model else _digest(files_fingerprint(folder, (*WEIGHT_SUFFIXES, ".json")))
    return Namespace(
        model=f"{model or content} under vLLM's offloading",
        format=BlockFormat(1, 1, row_bytes // (4 * tokens), "bfloat16", tokens),
        rope="in the model's configuration",
        compute=" ".join(f"{key}={value}" for key, value in words.items()),
    )


def head_range(heads: int, rank: int, ranks: int) -> str:
    """Which KV heads a rank has, like 2-3of4; with fewer heads than ranks, ranks share one."""
    each = max(1, heads // ranks)
    first = rank * heads // ranks
    return f"{first}-{first + each - 1}of{heads}"


def _backend(layer: Any) -> str:
    """Name and instruction set of a layer's attention; the latter is set before the first step."""
    return f"{layer.attn_backend.get_name()}/{getattr(layer, 'isa', 'none')}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def positions(model: Any) -> str:
    """What positions depend on besides the model's configuration: vLLM takes LongRoPE's long or
    short factors by its own limit of length, whatever a prompt's length is."""
    is_long = "longrope" in model.hf_config.to_json_string(use_diff=False)
    return f"max_model_len={model.max_model_len}" if is_long else "configured"


def model_name(config: Any) -> str:
    """Fingerprint of configuration and weights: by content where the files can be found."""
    model = config.model_config
    said = json.loads(model.hf_config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version"):
        said.pop(key, None)
    load, media = config.load_config, getattr(model, "multimodal_config", None)
    # These are not in vLLM's hash of a picture.
    seen = [getattr(media, name, None) for name in ("mm_processor_kwargs", "video_pruning_rate")]
    parts = (
        json.dumps(said, sort_keys=True), _weights(model, load), str(model.quantization),
        str(load.load_format), json.dumps(model.hf_overrides, default=repr),
        repr(seen),
    )  # fmt: skip
    return _digest(*parts)


def _weights(model: Any, load: Any) -> str:
    # With weights in an object store, the folder has the model's configuration only.
    remote = getattr(model, "model_weights", "")
    folder = None if remote else _model_folder(model.model, model.revision, load.download_dir)
    if folder is not None and load.load_format != "dummy" and has_files(folder, WEIGHT_SUFFIXES):
        return files_fingerprint(folder, WEIGHT_SUFFIXES)
    return f"{remote or model.model}@{model.revision} {load.model_loader_extra_config!r}"


def _model_folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    if Path(model).exists():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model, revision=revision, cache_dir=download_dir, local_files_only=True
        )
    except Exception:  # not a name of the hub, or not kept here: the name must do
        return None
    return Path(found)


def has_files(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether files_fingerprint has anything to look at. Raises: OSError."""
    return path.is_file() or any(one.suffix in suffixes for one in path.iterdir())


def files_fingerprint(path: Path, suffixes: Sequence[str]) -> str:
    """Hash of names and contents of files; about 10 GB/s where they are in the page cache.

    Args:
        path: a file, or a folder whose files with one of suffixes count.

    Raises: OSError.
    """
    files = (
        [path]
        if path.is_file()
        else sorted(one for one in path.iterdir() if one.suffix in suffixes)
    )
    hasher = xxhash.xxh3_128()
    for file in files:
        hasher.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                hasher.update(chunk)
    return hasher.hexdigest()
