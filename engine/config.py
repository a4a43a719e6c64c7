"""Settings of an engine: one frozen dataclass, its flags, and the only reads of the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvist.cachesvc.events.settings import checked_kv_events
from kvist.cachesvc.log import FORMATS, debug_detail
from kvist.engine.cache_address import CACHE_EMBEDDED, normal_cache
from kvist.engine.device.flags import DEVICES, add_device_flags
from kvist.engine.host import usable_cores
from kvist.engine.kv_dtype import add_kv_dtype_flags, check_kv_dtype
from kvist.engine.priority import INTERACTIVE, PRIORITIES
from kvist.proto.errors import ConfigInvalid
from kvist.proto.sizes import format_bytes, parse_bytes

DTYPES = ("auto", "bfloat16", "float32")
QUANTIZATIONS = ("auto", "none", "int8", "int4")
MODEL_HELP = "folder of safetensors, .gguf file, demo, or ORG/NAME in the local Hugging Face cache"
LOG_LEVELS = ("debug", "info", "warning", "error")
BLOCK_TOKENS_MAX = 4096
# A prompt holds up those that decode beside it for as long as a step takes: on a CPU that is soon
# too long. On a GPU few tokens leave the matrix units idle.
STEP_TOKENS = {"cpu": 512, "cuda": 8192}


def default_flash_path() -> str:
    """Folder of the embedded flash tier: $XDG_CACHE_HOME/kvist/flash or ~/.cache/kvist/flash."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(base) / "kvist" / "flash")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything `kvist serve` can be told, checked when made.

    Attributes:
        model: folder of safetensors, .gguf file, "demo", or ORG/NAME in Hugging Face's cache.
        host: address to listen on.
        port: TCP port; 0 takes any free one.
        served_model_name: name that clients use; None is the last part of the model's path.
        device: where to compute: "auto", "cpu", "cuda", "cuda:N"; see device.
        enforce_eager: capture no CUDA graphs.
        gpu_memory_utilization: share of a device's memory that is used, in (0, 1].
        dtype: of the computation: "auto" (what the processor does faster; bfloat16 on a device),
            "bfloat16", "float32".
        quantization: of the weights in memory: "auto" (4 and 8 bits where the file has them),
            "none" (all in dtype), "int8" or "int4" (rounded to these).
        kv_cache_dtype: of K and V: "auto" (bfloat16; dtype's where that is set) or of KV_DTYPES.
        kv_cache_scale: what a float8 number in a page is multiplied by; 1 for other dtypes.
        block_tokens: tokens per KV block and page, a power of two.
        max_model_len: tokens of prompt and output together; None is the model's own limit.
        max_num_batched_tokens: tokens of one step at most; None is up to the device.
        max_num_seqs: requests in the batch at most.
        kv_cache_bytes: bytes of the paged KV pool; None lets the core choose from free memory.
        threads: compute threads of the core.
        cache: "embedded", "off", or the sidecar's address as gRPC writes it.
        cache_dram_bytes: DRAM of the embedded cache.
        cache_flash_bytes: flash of the embedded cache; 0 turns that tier off.
        cache_flash_path: folder of the embedded flash tier.
        cache_overlap: load beside the computation, layer by layer, where that is shorter.
        cache_load_bytes_per_s: cap of copies out of the cache; 0 is none.
        cache_store_bytes_per_s: cap of copies into it; 0 is none.
        kv_events_config: JSON object, see cachesvc/events/settings.py; "" tells no events.
        enable_prefix_caching: reuse pages in the HBM tier; False turns all reuse off.
        api_key: what clients must send as a bearer token; None asks for nothing.
        log_level: "debug", "info", "warning" or "error". log_format: "text" or "json".
        log_detail: 0 to 3, what KVIST_DEBUG asks for; see cachesvc/log.py.
        seed: of the engine's own random draws.
        deterministic: a request without a seed gets one from its content, not from its turn.
        async_scheduling: plan a step while the one before it runs; None is up to the device.
        default_priority: class of requests that name none, see priority.
        priority_aging_seconds: waiting that raises the oldest request of a class by one.
        otlp_traces_endpoint: of an OpenTelemetry collector; "" traces nothing.
        drain_seconds: how long running requests may go on after SIGTERM.

    Raises:
        ConfigInvalid: a value is out of range; the message names the flag and the fix.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    device: str = "auto"
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    dtype: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_scale: float = 1.0
    block_tokens: int = 64
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 32
    kv_cache_bytes: int | None = None
    threads: int = field(default_factory=usable_cores)
    cache: str = CACHE_EMBEDDED
    cache_dram_bytes: int = 1 << 30
    cache_flash_bytes: int = 4 << 30
    cache_flash_path: str = field(default_factory=default_flash_path)
    cache_overlap: bool = True
    cache_load_bytes_per_s: int = 0
    cache_store_bytes_per_s: int = 0
    kv_events_config: str = ""
    enable_prefix_caching: bool = True
    api_key: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    log_detail: int = 0
    seed: int = 0
    deterministic: bool = False
    async_scheduling: bool | None = None
    default_priority: str = PRIORITIES[INTERACTIVE]
    priority_aging_seconds: float = 30.0
    otlp_traces_endpoint: str = ""
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigInvalid(
                "MODEL is empty; give a folder of safetensors, a .gguf file, or demo"
            )
        self._check_range("--port", self.port, 0, 65535)
        self._check_range("--block-size", self.block_tokens, 1, BLOCK_TOKENS_MAX)
        if self.block_tokens & (self.block_tokens - 1):
            raise ConfigInvalid(
                f"--block-size: {self.block_tokens} must be a power of two, like 64"
            )
        if self.max_model_len is not None:
            self._check_range("--max-model-len", self.max_model_len, 2, 1 << 24)
        tokens = self.step_tokens("cpu")
        self._check_range("--max-num-batched-tokens", tokens, 1, 1 << 20)
        self._check_range("--max-num-seqs", self.max_num_seqs, 1, 4096)
        if self.max_num_seqs > tokens:
            raise ConfigInvalid(
                f"--max-num-seqs: {self.max_num_seqs} requests need a token each in a step of "
                f"{tokens}; raise --max-num-batched-tokens"
            )
        if self.kv_cache_bytes is not None:
            self._check_range("--kv-cache-memory-bytes", self.kv_cache_bytes, 1 << 20, 1 << 50)
        self._check_range("--threads", self.threads, 1, 1024)
        self._check_range("--gpu-memory-utilization", self.gpu_memory_utilization, 0.05, 1)
        if not DEVICES.fullmatch(self.device):
            raise ConfigInvalid(
                f"--device: {self.device!r} is none; give auto, cpu, cuda or cuda:N"
            )
        self._check_range("--seed", self.seed, 0, 2**63 - 1)
        self._check_range("--drain-seconds", self.drain_seconds, 0, 86400)
        self._check_range("--priority-aging-seconds", self.priority_aging_seconds, 1, 86400)
        self._check_choice("--default-priority", self.default_priority, PRIORITIES)
        self._check_choice("--dtype", self.dtype, DTYPES)
        self._check_choice("--quantization", self.quantization, QUANTIZATIONS)
        check_kv_dtype(self.kv_cache_dtype, self.kv_cache_scale)
        self._check_choice("--log-level", self.log_level, LOG_LEVELS)
        self._check_choice("--log-format", self.log_format, FORMATS)
        if self.api_key == "":
            raise ConfigInvalid("--api-key is empty; give a key or leave the flag out")
        self._check_cache()

    def _check_cache(self) -> None:
        checked_kv_events(self.kv_events_config)
        object.__setattr__(self, "cache", normal_cache(self.cache))
        for flag, cap in (
            ("--cache-load-bandwidth", self.cache_load_bytes_per_s),
            ("--cache-store-bandwidth", self.cache_store_bytes_per_s),
        ):
            if cap:  # less than a block or two a second is a cache that is off
                self._check_range(flag, cap, 1 << 20, 1 << 50)
        if self.cache != CACHE_EMBEDDED:
            return
        self._check_range("--cache-dram-bytes", self.cache_dram_bytes, 1 << 20, 1 << 50)
        if self.cache_flash_bytes != 0:
            self._check_range("--cache-flash-bytes", self.cache_flash_bytes, 1 << 20, 1 << 50)

    @staticmethod
    def _check_range(flag: str, value: float, low: float, high: int) -> None:
        if not low <= value <= high:
            raise ConfigInvalid(f"{flag}: {value} is out of range; give {low} to {high}")

    @staticmethod
    def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ConfigInvalid(f"{flag}: {value!r} is not one of {', '.join(choices)}")

    def step_tokens(self, device: str) -> int:
        """Tokens of a step at most on a kind of device, see device.found.Device."""
        chosen = STEP_TOKENS.get(device, STEP_TOKENS["cpu"])
        return chosen if self.max_num_batched_tokens is None else self.max_num_batched_tokens

    def overlaps(self, device: str) -> bool:
        """Whether steps are planned ahead on a kind of device, see device.found.Device.

        On a processor they are not unless asked for: see "Steps may overlap" in
        docs/architecture.md for what was measured.
        """
        return device != "cpu" if self.async_scheduling is None else self.async_scheduling

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names by which clients may call the model, the shown one first."""
        if self.served_model_name:
            return (self.served_model_name,)
        if not Path(self.model).exists():
            return (self.model,)
        path = Path(self.model).resolve()
        return (path.stem if path.suffix == ".gguf" else path.name, self.model)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(kind: Callable[[str], float], what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return convert


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and one flag per field of EngineConfig; vLLM's names where vLLM has one."""
    whole = _number(int, "a whole number")
    # The default is that of --model: with one of its own, the place would overwrite the flag.
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=MODEL_HELP
    )
    _add_http_flags(parser.add_argument_group("HTTP"), whole)
    run = parser.add_argument_group("model")
    run.add_argument("--model", metavar="MODEL", help="in place of MODEL")
    add_device_flags(run)
    run.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} (%(default)s)")
    run.add_argument(
        "--quantization",
        default="auto",
        help=f"of the weights in memory: {', '.join(QUANTIZATIONS)}; auto keeps those that the "
        "file has in 4 or 8 bits in these, where the processor has the instructions (%(default)s)",
    )
    run.add_argument("--max-model-len", type=whole, metavar="TOKENS", help="default: the model's")
    run.add_argument(
        "--max-num-batched-tokens",
        type=whole,
        metavar="TOKENS",
        help=f"of one step (cpu {STEP_TOKENS['cpu']}, cuda {STEP_TOKENS['cuda']})",
    )
    run.add_argument("--max-num-seqs", type=whole, default=32, help="in a batch (%(default)s)")
    run.add_argument("--threads", type=whole, default=usable_cores(), help="compute (%(default)s)")
    run.add_argument("--seed", type=whole, default=0, help="of random draws (%(default)s)")
    run.add_argument("--log-level", default="info", help=f"{', '.join(LOG_LEVELS)} (%(default)s)")
    run.add_argument("--log-format", default="text", help=f"{', '.join(FORMATS)} (%(default)s)")
    _add_schedule_flags(parser.add_argument_group("schedule"))
    kv = parser.add_argument_group("KV cache")
    _add_cache_flags(kv, whole)
    _add_copy_flags(kv)


def _add_http_flags(http: argparse._ArgumentGroup, whole: Callable[[str], float]) -> None:
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    http.add_argument("--port", type=whole, default=8000, help="0 takes a free one (%(default)s)")
    http.add_argument("--served-model-name", metavar="NAME", help="name that clients use")
    http.add_argument(
        "--api-key",
        default=os.environ.get("KVIST_API_KEY"),
        help="clients must send it ($KVIST_API_KEY)",
    )
    http.add_argument(
        "--drain-seconds",
        type=_number(float, "a number"),
        default=30.0,
        help="let running requests go on this long after SIGTERM (%(default)s)",
    )
    http.add_argument(
        "--otlp-traces-endpoint",
        default="",
        metavar="URL",
        help="collector of OpenTelemetry traces, like http://localhost:4317; see docs/tracing.md",
    )


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--default-priority",
        default=PRIORITIES[INTERACTIVE],
        metavar="CLASS",
        help=f"of requests that name none: {', '.join(PRIORITIES)} (%(default)s)",
    )
    group.add_argument(
        "--priority-aging-seconds",
        type=_number(float, "a number"),
        default=30.0,
        metavar="SECONDS",
        help="waiting that raises the oldest request of a class, so that nobody starves "
        "(%(default)s)",
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan a step while the one before it runs; default: off on a CPU, where the planning "
        "takes the time from the computation",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same request gets the same answer, sampled ones without a seed too, whatever "
        "else runs and whatever is cached; for one --seed, number of threads, type of processor "
        "and release of torch; on a device slower kernels, whose bits depend on no neighbour",
    )


def _add_cache_flags(kv: argparse._ArgumentGroup, whole: Callable[[str], float]) -> None:
    add_kv_dtype_flags(kv, "auto", 1.0)
    kv.add_argument(
        "--block-size", dest="block_tokens", type=whole, default=64, help="tokens (%(default)s)"
    )
    kv.add_argument(
        "--kv-cache-memory-bytes",
        dest="kv_cache_bytes",
        type=_size,
        metavar="SIZE",
        help="paged pool (HBM tier), like 1GiB; default: from free memory",
    )
    kv.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse of pages; --no-enable-prefix-caching turns every tier off",
    )
    kv.add_argument(
        "--cache",
        default=CACHE_EMBEDDED,
        metavar="WHERE",
        help="embedded, off, or the sidecar's socket or host:port (%(default)s)",
    )
    for flag, size, what in (
        ("--cache-dram-bytes", 1 << 30, "embedded DRAM tier"),
        (
            "--cache-flash-bytes",
            4 << 30,
            "embedded flash tier, 0 is off; what models with blocks of other "
            "sizes have left may take as much again",
        ),
    ):
        text = f"{what} ({format_bytes(size)})"
        kv.add_argument(flag, type=_size, default=size, metavar="SIZE", help=text)
    kv.add_argument(
        "--cache-flash-path",
        default=default_flash_path(),
        metavar="FOLDER",
        help="of the embedded flash tier (%(default)s)",
    )


def _add_copy_flags(kv: argparse._ArgumentGroup) -> None:
    """How blocks move, and who is told."""
    kv.add_argument(
        "--kv-events-config",
        default="",
        metavar="JSON",
        help="KV events for routers over ZMQ, with vLLM's keys, like "
        '{"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}; see docs/events.md',
    )
    kv.add_argument(
        "--cache-overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load layer by layer beside the computation; --no-cache-overlap loads before it",
    )
    for way, what in (("load", "out of the cache"), ("store", "into the cache")):
        kv.add_argument(
            f"--cache-{way}-bandwidth",
            dest=f"cache_{way}_bytes_per_s",
            type=_size,
            default=0,
            metavar="SIZE",
            help=f"cap of copies {what}, per second, like 2GiB; 0 is none (%(default)s)",
        )


def config_from_flags(flags: argparse.Namespace) -> EngineConfig:
    """Turn parsed flags into settings; flags that are no setting are left out.

    Raises:
        ConfigInvalid: a value is out of range, or no model was given.
    """
    if flags.model is None:
        raise ConfigInvalid(f"MODEL or --model: say which: {MODEL_HELP}")
    names = EngineConfig.__dataclass_fields__
    given = {key: value for key, value in vars(flags).items() if key in names}
    return EngineConfig(**given, log_detail=debug_detail("engine", os.environ))
