"""Registers of 512 bits for numba: 16 floats as a type, and instructions that no loop becomes.

numba turns plain loops into vector code only where that keeps their order of additions, so a
sum over an array stays scalar. Here the order is written down instead: every function below is a
fixed sequence of instructions on fixed lanes. That is what the promise of equal bits stands on:
nothing here can be reordered for one number of rows and not for another.

Addresses are int64; memory need not be aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

FLOAT, HALF = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
LANES = 16
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS = ir.VectorType(I32, LANES)
# Division by zero gives an infinity, as in C; numba's own way would be a branch to an exception.
# No wrapper: these are called by other kernels only.
_njit: Any = njit
compiled = _njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.42860682030941723212e-6
# exp on [-ln2/2, ln2/2] as 1 + x + x^2 * polynomial (Cephes, expf): 2 ulp.
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
             1.6666665459e-1, 5.0000001201e-1)  # fmt: skip
# Beyond these exp is 0 and infinity in float32.
EXP_LEAST, EXP_MOST = -110.0, 100.0


class _Bfloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


BFLOAT_PAIRS = ir.VectorType(_Bfloat(), 2 * LANES)
BFLOATS = ir.VectorType(_Bfloat(), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


VECTOR = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


# -- pieces of code for other generators --


def at(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    """The pointer to a value of this LLVM type, offset bytes behind an address."""
    return builder.inttoptr(builder.add(address, I64(offset)), kind.as_pointer())


def load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    """Read a value of this LLVM type."""
    value = builder.load(at(builder, address, kind, offset))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Write a value."""
    builder.store(value, at(builder, address, value.type, offset)).align = 1


def constant(value: float) -> Any:
    """A register with the same number in all lanes."""
    return ir.Constant(FLOATS, [ir.Constant(FLOAT, value)] * LANES)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An intrinsic of LLVM."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


def broadcast(builder: Any, value: Any) -> Any:
    """A scalar in all lanes."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(WORDS, None))


def shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Chosen lanes of two registers; those of b are counted on from a's."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


def dot_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1] in float32, of bfloat16: one instruction."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a, b)


def exponential(builder: Any, x: Any) -> Any:
    """exp of each lane, within 2 ulp; below EXP_LEAST exactly 0."""
    x = call(builder, "llvm.maxnum.v16f32", FLOATS, x, constant(EXP_LEAST))
    x = call(builder, "llvm.minnum.v16f32", FLOATS, x, constant(EXP_MOST))
    whole = call(builder, "llvm.rint.v16f32", FLOATS, builder.fmul(x, constant(LOG2E)))
    rest = fused(builder, whole, constant(-LN2_HIGH), x)
    rest = fused(builder, whole, constant(-LN2_LOW), rest)
    value = constant(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        value = fused(builder, value, rest, constant(term))
    value = fused(builder, builder.fmul(rest, rest), value, rest)
    value = builder.fadd(value, constant(1.0))
    name = "llvm.x86.avx512.mask.scalef.ps.512"
    return call(builder, name, FLOATS, value, whole, value, I16(-1), I32(4))


def halve(builder: Any, x: Any, name: str) -> Any:
    """Combine all lanes to one number, each with the lane half a register away, four times."""
    for half in (8, 4, 2, 1):
        lanes = [lane ^ half for lane in range(LANES)]
        other = shuffled(builder, x, x, lanes)
        x = builder.fadd(x, other) if name == "add" else call(builder, name, FLOATS, x, other)
    return builder.extract_element(x, I32(0))


# -- instructions for numba --


def define(result: Any, arguments: tuple[Any, ...], code: Callable[..., Any]) -> Any:
    """An intrinsic with fixed types from a function (builder, *values) -> value."""
    names = ", ".join(f"a{number}" for number in range(len(arguments)))

    def body(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        made = code(builder, *values)
        return context.get_dummy_value() if made is None else made

    def typed(*_: Any) -> Any:
        return result(*arguments), body

    scope: dict[str, Any] = {"typed": typed}
    exec(f"def f(context, {names}):\n    return typed()", scope)
    return intrinsic(scope["f"])


_ADDRESS = types.int64
_NUMBER = types.float32


def _load_bf16(builder: Any, address: Any) -> Any:
    narrow = load(builder, address, ir.VectorType(I16, LANES))
    return builder.bitcast(builder.shl(builder.zext(narrow, WORDS), broadcast_of(16)), FLOATS)


def broadcast_of(value: int) -> Any:
    """A register of 32-bit words, the same in all lanes."""
    return ir.Constant(WORDS, [I32(value)] * LANES)


def to_bf16(builder: Any, x: Any) -> Any:
    """16 floats rounded to nearest even."""
    return call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BFLOATS, x)


def _keep_first(builder: Any, x: Any, last: Any) -> Any:
    lanes = ir.Constant(WORDS, [I32(lane) for lane in range(LANES)])
    limit = broadcast(builder, builder.trunc(last, I32))
    kept = builder.icmp_signed("<=", lanes, limit)
    return builder.select(kept, x, constant(float("-inf")))


def _fetch_add(builder: Any, address: Any, count: Any) -> Any:
    return builder.atomic_rmw("add", at(builder, address, I64), count, "seq_cst")


def _pause(builder: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])


def _read(builder: Any, address: Any) -> Any:
    return builder.load_atomic(at(builder, address, I64), "seq_cst", 8)


load_f32 = define(VECTOR, (_ADDRESS,), lambda b, address: load(b, address, FLOATS))
load_bf16 = define(VECTOR, (_ADDRESS,), _load_bf16)
store_f32 = define(types.void, (_ADDRESS, VECTOR), lambda b, address, x: store(b, x, address))
store_bf16 = define(
    types.void, (_ADDRESS, VECTOR), lambda b, address, x: store(b, to_bf16(b, x), address)
)
# The first lane alone.
store_lane = define(
    types.void,
    (_ADDRESS, VECTOR),
    lambda b, address, x: store(b, b.extract_element(x, I32(0)), address),
)
store_number = define(types.void, (_ADDRESS, _NUMBER), lambda b, address, x: store(b, x, address))
splat = define(VECTOR, (_NUMBER,), broadcast)
add = define(VECTOR, (VECTOR, VECTOR), lambda b, x, y: b.fadd(x, y))
subtract = define(VECTOR, (VECTOR, VECTOR), lambda b, x, y: b.fsub(x, y))
multiply = define(VECTOR, (VECTOR, VECTOR), lambda b, x, y: b.fmul(x, y))
divide = define(VECTOR, (VECTOR, VECTOR), lambda b, x, y: b.fdiv(x, y))
multiply_add = define(VECTOR, (VECTOR, VECTOR, VECTOR), fused)
larger = define(
    VECTOR, (VECTOR, VECTOR), lambda b, x, y: call(b, "llvm.maxnum.v16f32", FLOATS, x, y)
)
exp = define(VECTOR, (VECTOR,), exponential)
# Lanes after `last` become minus infinity.
keep_first = define(VECTOR, (VECTOR, _ADDRESS), _keep_first)
lane_sum = define(_NUMBER, (VECTOR,), lambda b, x: halve(b, x, "add"))
lane_max = define(_NUMBER, (VECTOR,), lambda b, x: halve(b, x, "llvm.maxnum.v16f32"))
# The value before; 64 bits.
fetch_add = define(_ADDRESS, (_ADDRESS, _ADDRESS), _fetch_add)
read = define(_ADDRESS, (_ADDRESS,), _read)
# A number of 64 bits that no other thread changes now.
word = define(_ADDRESS, (_ADDRESS,), lambda b, address: load(b, address, I64))
pause = define(types.void, (), _pause)
