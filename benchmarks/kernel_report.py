"""Compile every Triton kernel for a GPU that need not be there, and say what the code needs.

The launchers are called with the shapes of Llama 8B, but instead of being launched each kernel is
compiled: registers and shared memory of a program, bytes that spill to local memory, and how often
its code has matrix instructions, asynchronous copies and fused multiply-adds. The interpreter
accepts what the compiler does not, so this is also the proof that the kernels compile. Last it says
how many codes of each kernel steps of any shape ask for: each is compiled when it is first met,
while requests wait. Needs no GPU; must not run with TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.weights import LoadedModel, tensor_shapes
from kvist.kernels.device.add_norm import add_rms_norm
from kvist.kernels.device.decode_attention import decode_attention, new_decode_plan
from kvist.kernels.device.gate import silu_gate
from kvist.kernels.device.kv_copy import gather, scatter
from kvist.kernels.device.matmul import matmul
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.prefill_attention import plan_prefill, prefill_attention
from kvist.kernels.device.rope_store import rope_store
from kvist.kernels.device.sampling import new_draws, sample
from kvist.kernels.rope import RopeParams, rope_table

WARP = 32
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, HIDDEN = 32, 8, 128, 64, 4096
DTYPES = ((torch.bfloat16, ""), (torch.float8_e4m3fn, "_float8"), (torch.float32, "_float32"))


class Compiler:
    """Takes the place of JITFunction.run: compiles what would be launched.

    Attributes:
        label: behind the names of kernels from now on.
        compiles: or only notes.
        found: what was compiled.
        codes: that launches asked for, by kernel.
    """

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, WARP)
        self._backend = make_backend(self._target)
        self.label = ""
        self.compiles = True
        self.found: dict[str, dict[str, Any]] = {}
        self.codes: dict[str, set[str]] = {}

    def take(self, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Compile one launch, or only note which code it asks for."""
        if named.get("PRECISION") == "wide":  # on a CPU the launcher asks for the interpreter's
            named["PRECISION"] = "tf32"
        bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        bound, specialization, _ = bind(*args, **named)
        options = {
            name: named[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")
            if name in named
        }  # fmt: skip
        name = kernel.__name__.strip("_")
        constants, attributes = {}, {}
        for index, (kind, attribute) in enumerate(specialization):
            if kind == "constexpr":
                constants[index,] = bound[kernel.params[index].name]
            elif isinstance(attribute, str):
                attributes[index,] = self._backend.parse_attr(attribute)
        signature = {
            one.name: kind for one, (kind, _) in zip(kernel.params, specialization, strict=True)
        }
        code = repr((signature, constants, attributes, options))
        self.codes.setdefault(name, set()).add(code)
        if self.compiles:
            source = ASTSource(kernel, signature, constants, attributes)
            done = triton.compile(source, target=self._target, options=options)
            resources = _resources(done.asm)
            self.found[name + self.label] = {"shared_bytes": done.metadata.shared, **resources}


def _resources(code: dict[str, Any]) -> dict[str, int]:
    """What the assembler says, and how often some instructions stand in the code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = code["ptx"]
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "fused": ptx.count("fma.rn.f32") + ptx.count("fma.rn.ftz.f32"),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def launch_all(compiler: Compiler) -> None:
    """Every launcher once; those that read pages for float8 pages too, and those that multiply for
    float32."""
    bf16 = torch.bfloat16
    for dtype, compiler.label in DTYPES:
        wide = torch.float32 if dtype == torch.float32 else bf16
        pool = torch.zeros((2, 2, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)).to(dtype)
        lengths = torch.tensor([100, 20], dtype=torch.int32)
        paged = Paged(pool, torch.zeros((2, 16), dtype=torch.int32), lengths)
        q = torch.zeros((2, HEADS, HEAD_DIM), dtype=wide)
        plan = new_decode_plan(2, 120, HEADS, HEAD_DIM, q.device)
        plan.cut(lengths)
        decode_attention(q, paged, 0, plan, q.clone())
        several = plan_prefill(lengths, lengths, 2, HEADS, KV_HEADS)
        prefill_attention(q, paged, 0, several, q.clone())
        projected = torch.zeros((2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), dtype=wide)
        positions = torch.zeros(2, dtype=torch.int64)
        table = rope_table(RopeParams(10000.0, HEAD_DIM, 32))
        rope_store(projected, positions, table, paged, 0, positions)
        if dtype != torch.float8_e4m3fn:
            x = torch.zeros((2, HIDDEN), dtype=wide)
            matmul(x, torch.zeros((64, HIDDEN), dtype=wide))
    compiler.label = ""
    pool = torch.zeros((2, 2, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM), dtype=bf16)
    gather(pool, lengths, pool.clone())
    scatter(pool, lengths, pool.clone())
    x = torch.zeros((2, HIDDEN), dtype=bf16)
    add_rms_norm(x, x.clone(), x[0], 1e-5)
    silu_gate(x)
    sample(torch.zeros((2, 128256)), new_draws(2, x.device), positions)


def launch_steps() -> None:
    """Steps of many shapes: decodes beside prompts, rows of a persistent batch."""
    shape = ModelConfig(96, 1, 64, 4, 2, 16, 48, 4096, 1e-5, 1e4, False, (), "llama")
    tensors = {name: torch.zeros(size) for name, size in tensor_shapes(shape).items()}
    loaded = LoadedModel(shape, RopeParams(1e4, 16, 4096), "float32", tensors, "none")
    pool = torch.zeros((64, 1, 2, 2, 16, 16))
    for fast in (True, False):
        model = CudaLlama(loaded, "cpu", fast=fast)
        for decodes in (0, 1, 2, 3, 4, 7):
            for length in (5, 16, 40, 250):
                chunks = [Chunk([1], start, range(32), True) for start in range(decodes)]
                model.forward([*chunks, Chunk([1] * length, 9, range(64), True)], pool)
        for width in (1, 16, 33):
            batch = DecodeBatch(model, pool, rows=20, width=width, keys=999 + width)
            for rows in (1, 3, 16, 20):
                batch.run(rows)


def main() -> None:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 90, 100")
    compiler = Compiler(parser.parse_args().capability)

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **named: Any) -> None:
        del grid, warmup
        compiler.take(kernel, args, named)

    JITFunction.run = run
    launch_all(compiler)
    compiler.compiles = False
    compiler.codes.clear()
    launch_steps()
    codes = {name: len(found) for name, found in sorted(compiler.codes.items())}
    result = {"bench": "kernel_report", "triton": triton.__version__, **compiler.found}
    print(json.dumps({**result, "codes_of_steps": codes}))


if __name__ == "__main__":
    main()
