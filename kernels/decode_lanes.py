"""Decode attention over packed codes, written for one thread of a warp: what Pallas has no operations for.

Codes become bfloat16 without a conversion instruction: put into the mantissa of 128 (`0x4300`) a code `c` below 128
reads as `128 + c`. Keys need no more, since `q @ (128 + c) - 128 * sum(q)` starts from the second term; values subtract
it. Codes of 8 bits do not fit, so their highest bit chooses what is subtracted: 128 or 256.

Products are those of `mma.m16n8k16`: tokens (for the values, channels) by queries, so that codes are the operand in
registers, and queries are eight wide. Which token or channel an index of the product stands for is free as long as
both sides agree, so each thread reads 16 bytes at once. A warp keeps its own softmax over its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

inline_ptx: Any = getattr(utils, "inline_ptx", None)
"""Of JAX 0.11, which this kernel needs on a GPU."""

Value = Any
"""An MLIR value, of one thread."""

LEAST = -1e30
"""A running maximum before anything was seen: finite, so that no difference of two is NaN."""

TOGETHER = 16
"""Rows of bytes that a warp takes at once: the tokens of a matrix product, `8 // bits` times."""


def i32(x: int | Value) -> Value:
    """A constant, or any integer as one of 32 bits."""
    type_ = ir.IntegerType.get_signless(32)
    if isinstance(x, int):
        return arith.constant(type_, x - 2**32 if x >= 2**31 else x)
    return x if x.type == type_ else arith.index_cast(type_, x)


def f32(x: float) -> Value:
    """A constant."""
    return arith.constant(ir.F32Type.get(), float(x))


def add(x: Value, y: int | Value) -> Value:
    """Of integers."""
    return arith.addi(x, i32(y))


def mul(x: Value, y: int | Value) -> Value:
    """Of integers."""
    return arith.muli(x, i32(y))


def div(x: Value, y: int) -> Value:
    """Of integers from 0 on."""
    return arith.divui(x, i32(y))


def rem(x: Value, y: int) -> Value:
    """Of integers from 0 on."""
    return arith.remui(x, i32(y))


def shifted(x: Value, by: int) -> Value:
    """`x >> by`."""
    return arith.shrui(x, i32(by)) if by else x


def asm(text: str, *args: Value, result=None, together: bool = False) -> Value:
    """An instruction with results and without effects; `together` if a warp must run it as one."""
    return inline_ptx(text, *args, result_types=result or args[0].type, convergent=together)


def exp2(x: Value) -> Value:
    """The hardware's exponential."""
    return asm("ex2.approx.ftz.f32 $0, $1;", x)


def log2(x: Value) -> Value:
    """The hardware's logarithm."""
    return asm("lg2.approx.f32 $0, $1;", x)


def pick(a: Value, b: Value, bytes_: int) -> Value:
    """Four of eight bytes, by their numbers."""
    return asm("prmt.b32 $0, $1, $2, $3;", a, b, i32(bytes_))


def pair_op(name: str, *args: Value) -> Value:
    """Arithmetic on two bfloat16 numbers at once."""
    return asm(f"{name}.bf16x2 $0, {', '.join(f'${i + 1}' for i in range(len(args)))};", *args)


def packed(high: Value, low: Value) -> Value:
    """Two numbers as bfloat16, in one word."""
    return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result=ir.IntegerType.get_signless(32))


def product(acc: list[Value], a: list[Value], b: list[Value]) -> list[Value]:
    """`acc + a @ b` of one `m16n8k16`."""
    f = ir.F32Type.get()
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return list(asm(text, *a, *b, *acc, result=(f, f, f, f), together=True))


def load(ptr: Value, offset: Value, words: int = 1, type_=None) -> list[Value]:
    """Words of 32 bits, or one number of `type_`, from `offset` bytes after `ptr`."""
    at = utils.getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))
    type_ = type_ or ir.IntegerType.get_signless(32)
    size = words * utils.bitwidth(type_) // 8
    if words == 1:
        return [llvm.load(type_, at, alignment=size)]
    whole = llvm.load(ir.VectorType.get((words,), type_), at, alignment=size)
    return [llvm.extractelement(whole, i32(i)) for i in range(words)]


def store(ptr: Value, offset: Value, *values: Value) -> None:
    """Numbers of one type, behind each other."""
    at = utils.getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))
    size = len(values) * utils.bitwidth(values[0].type) // 8
    if len(values) == 1:
        llvm.store(values[0], at, alignment=size)
        return
    whole = llvm.mlir_undef(ir.VectorType.get((len(values),), values[0].type))
    for i, value in enumerate(values):
        whole = llvm.insertelement(whole, value, i32(i))
    llvm.store(whole, at, alignment=size)


def number(ref: Value, index: Value) -> Value:
    """One floating-point number of a vector in memory, in 32 bits."""
    type_ = ir.MemRefType(ref.type).element_type
    [x] = load(utils.memref_ptr(ref), mul(index, utils.bitwidth(type_) // 8), type_=type_)
    return x if type_ == ir.F32Type.get() else arith.extf(ir.F32Type.get(), x)


def choose(condition: Value, yes, no, types: list) -> list[Value]:
    """What `yes` or `no`, functions, give: a branch."""
    branch = scf.IfOp(condition, types, has_else=True)
    for block, values in ((branch.then_block, yes), (branch.else_block, no)):
        with ir.InsertionPoint(block):  # ty: ignore[no-matching-overload]
            scf.yield_(values())
    return list(branch.results)


def counted(start: Value, stop: Value, step: int, body, state: list[Value]) -> list[Value]:
    """`state` after `body(i, state)` for each `step`-th integer from `start` to below `stop`."""
    index = ir.IndexType.get()
    first = arith.index_cast(index, start)
    last = arith.index_cast(index, arith.maxsi(start, stop))
    loop = scf.ForOp(first, last, utils.c(step, index), state)
    with ir.InsertionPoint(loop.body):
        scf.yield_(body(i32(loop.induction_variable), list(loop.inner_iter_args)))
    return list(loop.results)


def across(x: Value, join) -> Value:
    """Join over the eight threads of a warp that hold the same columns."""
    for distance in (4, 8, 16):
        x = join(x, utils.shfl_bfly(x, distance))
    return x


@dataclass(frozen=True)
class Shape:
    """Static sizes of a thread's work.

    Args:
        dim: channels of a head: 64, 128 or 256.
        queries: of a K/V head.
        warps: that share a tile.
        rows: of bytes in a tile.
        bits: of a code.
        span: rows of bytes that a group takes.
    """

    dim: int
    queries: int
    warps: int
    rows: int
    bits: int
    span: int

    @property
    def eights(self) -> int:
        return -(-self.queries // 8)

    @property
    def per(self) -> int:
        return 8 // self.bits

    @property
    def sums(self) -> int:
        """Sums that a thread keeps: two queries of each eight, `dim / 8` channels."""
        return self.dim // 4 * self.eights

    @property
    def state(self) -> int:
        """Numbers of a thread's state: the sums, and a peak, a total and a shift for each of its queries."""
        return self.sums + 6 * self.eights

    @property
    def fixed(self) -> int:
        """Words of what a row's queries are to a thread: fragments, their sums, and positions' ends."""
        return (self.dim // 8 + 4) * self.eights

    @property
    def swizzle(self) -> int:
        return min(self.dim, 128)


@dataclass(frozen=True)
class Lane:
    """Where a thread is: in its block, in its warp, and there in a fragment."""

    thread: Value
    warp: Value
    row: Value
    column: Value


def here() -> Lane:
    """This thread."""
    thread = utils.thread_idx()
    lane = rem(thread, 32)
    return Lane(thread, div(thread, 32), div(lane, 4), rem(lane, 4))


def place(shape: Shape, row: Value, chunk: Value) -> Value:
    """Byte offset in a tile of 16 bytes of a row, which lie as the copy engine puts them against bank conflicts."""
    each = shape.swizzle // 16
    flat = add(mul(div(row, 8), 8 * shape.dim), mul(rem(row, 8), shape.swizzle))
    flat = add(add(flat, mul(div(chunk, each), 8 * shape.swizzle)), mul(rem(chunk, each), 16))
    return arith.xori(flat, mul(rem(shifted(flat, 7), each), 16))


def key_chunks(shape: Shape, at: Lane) -> list[Value]:
    """Which 16 channels of a token a thread reads."""
    if shape.dim == 64:
        return [at.column]
    return [add(mul(at.column, 2), i // 2 * 8 + i % 2) for i in range(shape.dim // 64)]


def begin(shape: Shape, q_ref: Value, asks_ref: Value) -> tuple[list[Value], list[Value]]:
    """What a row's queries are to a thread, and its state before it saw a token."""
    at, zero = here(), i32(0)
    q_ptr, fragments = utils.memref_ptr(q_ref), []
    for eight in range(shape.eights):
        query = add(at.row, 8 * eight)
        there = arith.cmpi(arith.CmpIPredicate.ult, query, i32(shape.queries))
        query = arith.select(there, query, zero)
        for chunk in key_chunks(shape, at):
            for half in range(2):
                offset = add(mul(query, 2 * shape.dim), add(mul(chunk, 32), 16 * half))
                words = load(q_ptr, offset, 4)
                for a, b in (words[:2], words[2:]):
                    fragments += [arith.select(there, pick(a, b, order), zero) for order in (0x5410, 0x7632)]
    sums, asks = [], []
    ones, none = i32(0x3F803F80), f32(0.0)
    each = shape.dim // 8
    for eight in range(shape.eights):
        acc = [none] * 4
        for i in range(each * eight, each * (eight + 1), 2):
            acc = product(acc, [ones] * 4, fragments[i : i + 2])
        sums += [arith.bitcast(ir.IntegerType.get_signless(32), x) for x in acc[:2]]
        for side in range(2):
            [ask] = load(utils.memref_ptr(asks_ref), mul(add(mul(at.column, 2), 8 * eight + side), 4))
            asks.append(arith.maxsi(add(ask, 1), zero))
    state = [none] * shape.sums + [f32(LEAST)] * (2 * shape.eights) + [none] * (4 * shape.eights)
    return fragments + sums + asks, state


def key_pairs(shape: Shape, word: Value) -> list[tuple[Value, Value]]:
    """Channels (0, 2) and (1, 3) of a word, for each place of a code in a byte, as `code * 4**place + 128`."""
    return [(magic(shape, word, i), magic(shape, word, i + shape.per)) for i in range(shape.per)]


def magic(shape: Shape, word: Value, field_: int) -> Value:
    """Two codes as bfloat16. For 2 bits, `128 + code * 4**(field_ % 4)` below the last field; for 8, `code - 128`."""
    if shape.bits == 8:
        word, base = shifted(word, 8 * field_), i32(0x43004300)
        low = arith.ori(arith.andi(word, i32(0x007F007F)), base)
        flipped = arith.xori(word, i32(0x00800080))
        return pair_op("sub", low, arith.ori(arith.andi(flipped, i32(0x00800080)), base))
    if shape.bits == 4:
        return arith.ori(arith.andi(shifted(word, 4 * field_), i32(0x000F000F)), i32(0x43004300))
    high, low = divmod(field_, 4)
    by = 8 * high + (6 if low == 3 else 0)
    mask = 0x00030003 << (0 if low == 3 else 2 * low)
    return arith.ori(arith.andi(shifted(word, by), i32(mask)), i32(0x43004300))


def factor(shape: Shape, place_: int) -> int:
    """What `magic` multiplies codes by."""
    return 4**place_ if shape.bits == 2 and place_ < 3 else 1


def centred(shape: Shape, x: Value, place_: int) -> Value:
    """`code - 2**(bits - 1)`, from what `magic` gives."""
    if shape.bits == 8:
        return x
    if shape.bits == 4:
        return pair_op("sub", x, i32(0x43084308))  # 136
    if factor(shape, place_) == 1:
        return pair_op("sub", x, i32(0x43024302))  # 130
    scale, base = {1: (0x3E80, 0xC208), 2: (0x3D80, 0xC120)}[place_]  # 1/4 and -34, 1/16 and -10
    return pair_op("fma.rn", x, i32(scale * 0x10001), i32(base * 0x10001))
