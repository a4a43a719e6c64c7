"""Compile every Triton kernel for a GPU that need not be there, and say what the code needs.

The launchers are called with the shapes of Llama 8B, but instead of being launched each kernel is
compiled: registers and shared memory of a program, bytes that spill to local memory, and how often
its code has matrix instructions, asynchronous copies and fused multiply-adds. The interpreter
accepts what the compiler does not, so this is also the proof that the kernels compile. Needs no
GPU; must not run with TRITON_INTERPRET set.
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
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, HIDDEN = 32, 8, 128, 64, 4096


class Compiler:
    """Takes the place of JITFunction.run: compiles what would be launched."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, WARP)
        self.label = ""
        self.found: dict[str, dict[str, Any]] = {}

    def compile(self, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Compile one launch."""
        names = list(kernel.arg_names)
        given = {**dict(zip(names, args, strict=False)), **named}
        options = {
            name: given[name]
            for name in ("num_warps", "num_stages", "enable_fp_fusion")
            if name in given
        }
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                # On a CPU the launcher asks for what the interpreter needs.
                constants[index,] = "tf32" if value == "wide" else value
                signature[parameter.name] = "constexpr"
                continue
            signature[parameter.name] = _type_of(value)
            even = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if even and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        done = triton.compile(source, target=self._target, options=options)
        name = kernel.__name__.strip("_") + self.label
        self.found[name] = {"shared_bytes": done.metadata.shared, **_resources(done.asm)}


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


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
    """Every launcher once, and those that read pages for float8 pages too."""
    bf16 = torch.bfloat16
    for dtype in (bf16, torch.float8_e4m3fn):
        compiler.label = "" if dtype == bf16 else "_float8"
        pool = torch.zeros((2, 2, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)).to(dtype)
        lengths = torch.tensor([100, 20], dtype=torch.int32)
        paged = Paged(pool, torch.zeros((2, 16), dtype=torch.int32), lengths)
        q = torch.zeros((2, HEADS, HEAD_DIM), dtype=bf16)
        plan = new_decode_plan(2, 120, HEADS, HEAD_DIM, q.device)
        plan.cut(lengths)
        decode_attention(q, paged, 0, plan, q.clone())
        several = plan_prefill(lengths, lengths, 2, HEADS, KV_HEADS)
        prefill_attention(q, paged, 0, several, q.clone())
        projected = torch.zeros((2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), dtype=bf16)
        positions = torch.zeros(2, dtype=torch.int64)
        table = rope_table(RopeParams(10000.0, HEAD_DIM, 32))
        rope_store(projected, positions, table, paged, 0, positions)
    compiler.label = ""
    pool = torch.zeros((2, 2, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM), dtype=bf16)
    gather(pool, lengths, pool.clone())
    scatter(pool, lengths, pool.clone())
    x = torch.zeros((2, HIDDEN), dtype=bf16)
    add_rms_norm(x, x.clone(), x[0], 1e-5)
    silu_gate(x)
    matmul(x, torch.zeros((64, HIDDEN), dtype=bf16))
    sample(torch.zeros((2, 128256)), new_draws(2, x.device), positions)


def main() -> None:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 90, 100")
    compiler = Compiler(parser.parse_args().capability)

    def run(kernel: Any, *args: Any, **named: Any) -> None:
        compiler.compile(kernel, args, named)

    JITFunction.run = run
    launch_all(compiler)
    result = {"bench": "kernel_report", "triton": triton.__version__, **compiler.found}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
