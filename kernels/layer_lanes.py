"""A layer's products, written for one thread of a warp: what Pallas has no operations for.

Products are those of `mma.m16n8k16`, sixteen outputs by eight rows, so that weights are the operand in registers.
Which input an index of the product stands for is free as long as both sides agree, so each thread reads 16 bytes at
once of either. All consuming warps share the inputs of a stage and add up what they have at the end of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from kernels import decode_lanes as lanes
from kernels.decode_lanes import Value, add, asm, div, f32, i32, load, mul, product, rem, store
from kernels.decode_parts import LOG2E
from kernels.decode_steps import BARRIER

WARPS = 8
"""That multiply: two warpgroups."""

THREADS = 32 * WARPS

UNIT = 16
"""Outputs that are made at once."""


@dataclass(frozen=True)
class Phase:
    """One of the four products.

    Args:
        units: of sixteen outputs.
        inputs: of the product.
        chunk: inputs of a stage.
        gated: half of a unit are gates, the other half what they scale; the results are half as many.
        normed: its input is.
    """

    units: int
    inputs: int
    chunk: int
    gated: bool = False
    normed: bool = False

    @property
    def results(self) -> int:
        """Of a unit."""
        return UNIT // 2 if self.gated else UNIT


@dataclass(frozen=True)
class Sizes:
    """Static sizes of a thread's work.

    Args:
        rows: of the input, up to eight.
        wide: numbers of the widest input.
        chunk: inputs of the largest stage.
        workers: thread blocks, which all run at once.
        eps: of the norms.
    """

    rows: int
    wide: int
    chunk: int
    workers: int
    eps: float

    @property
    def stride(self) -> int:
        """Numbers from a row of the input to the next: eight threads read 16 bytes of two rows from 32 banks."""
        return self.wide + 32

    @property
    def half(self) -> int:
        """Sums that warps leave for a unit."""
        return WARPS * UNIT * self.rows

    @property
    def shared(self) -> int:
        """Numbers of memory for them, twice, and for the squares of rows."""
        return 2 * self.half + WARPS * self.rows


def meet() -> None:
    """Wait for all consuming warps."""
    lanes.inline_ptx(f"bar.sync {BARRIER}, {THREADS};", has_side_effects=True, convergent=True)


def await_all(counter: Value, number: int) -> None:
    """Wait until `number` workers have signalled, and let the others of this one wait."""
    with utils.when(equal(utils.thread_idx(), 0)):
        loop = scf.WhileOp([], [])
        with ir.InsertionPoint(loop.before.blocks.append()):
            seen = asm_volatile("ld.acquire.gpu.global.u32 $0, [$1];", utils.memref_ptr(counter))
            scf.condition(less(seen, number), [])
        with ir.InsertionPoint(loop.after.blocks.append()):
            scf.yield_([])
    meet()


def signal(counters: Value, nth: int, number: int, zero: int = 0) -> None:
    """Count this worker up in counter `nth`, after all it has stored; the last sets the first `zero` counters to 0."""
    meet()
    with utils.when(equal(utils.thread_idx(), 0)):
        base = utils.memref_ptr(counters)
        before = arrive(utils.getelementptr(base, [i32(4 * nth)], ir.IntegerType.get_signless(8)))
        if zero:
            with utils.when(equal(before, number - 1)):
                for i in range(zero):
                    store(base, i32(4 * i), i32(0))


def arrive(at: Value) -> Value:
    """Add one to a counter in device memory, after all that this thread knows to be stored; what it was before."""
    return asm_volatile("fence.acq_rel.gpu; atom.add.acq_rel.gpu.global.u32 $0, [$1], 1;", at)


def asm_volatile(text: str, *args: Value) -> Value:
    """An instruction with one 32-bit result that may not be moved or left out."""
    type_ = ir.IntegerType.get_signless(32)
    return lanes.inline_ptx(text, *args, result_types=type_, has_side_effects=True)


def scales(phase: Phase, norm: Value) -> list[list[Value]]:
    """This thread's part of a norm's scale, asked for before anything waits."""
    found = []
    for i in range(_each(phase)):
        place = arith.select(_inside(phase, i), _place(i), i32(0))
        found.append(
            [x for j in range(2) for x in load(utils.memref_ptr(norm), add(mul(place, 32), 16 * j), 4, _f32())]
        )
    return found


def bring(sizes: Sizes, phase: Phase, source: Value, x: Value, sums: Value, scale: list[list[Value]] | None) -> None:
    """The phase's input into shared memory, normed where it must be.

    Other workers wrote it, so it is read past the first level's cache.
    """
    each = _each(phase)
    together = max(1, 16 // each)
    for first in range(0, sizes.rows, together):
        rows = range(first, min(first + together, sizes.rows))
        words = [[_read(phase, source, row, i) for i in range(each)] for row in rows]
        if scale is not None:
            words = _normed(sizes, phase, words, rows, sums, scale)
        for row, some in zip(rows, words, strict=True):
            for i in range(each):
                with utils.when(_inside(phase, i)):
                    store(utils.memref_ptr(x), add(mul(_place(i), 16), 2 * row * sizes.stride), *some[i])
    meet()


def multiply(sizes: Sizes, phase: Phase, w: Value, x: Value, stage: Value, acc: list[Value]) -> list[Value]:
    """`acc` and the products of a stage, whose inputs warps take by thirty-twos in turn.

    Args:
        w: sixteen rows of weights in shared memory, as the copy engine laid them: 128 bytes of eight rows after each
            other, the 16-byte pieces of a row exchanged by its number.
    """
    at = lanes.here()
    weights, inputs = utils.memref_ptr(w), utils.memref_ptr(x)
    row = i32(0) if sizes.rows == 1 else arith.minui(at.row, i32(sizes.rows - 1))
    line = mul(row, 2 * sizes.stride)
    odd = [f32(0.0)] * 4
    pieces = phase.chunk // 32
    for n in range(-(-pieces // WARPS)):
        piece = add(at.warp, WARPS * n)
        there = None if WARPS * (n + 1) <= pieces else less(piece, pieces)
        if there is not None:
            piece = arith.select(there, piece, i32(0))
        sixteen = arith.xori(add(mul(rem(piece, 2), 4), at.column), at.row)
        place = add(mul(div(piece, 2), 1024), add(mul(at.row, 128), mul(sixteen, 16)))
        low, high = load(weights, place, 4), load(weights, add(place, 16 * sizes.chunk), 4)
        first = add(add(mul(stage, phase.chunk), mul(piece, 32)), mul(at.column, 8))
        xs = load(inputs, add(line, mul(first, 2)), 4)
        if there is not None:
            xs = [arith.select(there, v, i32(0)) for v in xs]
        acc = product(acc, [low[0], high[0], low[1], high[1]], xs[:2])
        odd = product(odd, [low[2], high[2], low[3], high[3]], xs[2:])
    return [arith.addf(a, b) for a, b in zip(acc, odd, strict=True)]


def finish(
    sizes: Sizes,
    phase: Phase,
    acc: list[Value],
    unit: Value,
    nth: Value,
    sums: Value,
    out: Value,
    residual: Value | None = None,
) -> None:
    """A unit's results to memory, rounded where a model's layers round.

    Args:
        nth: of this worker's units in the phase: two take turns in `sums`, so that warps need not wait twice.
    """
    at = lanes.here()
    shared, to = utils.memref_ptr(sums), utils.memref_ptr(out)
    base = mul(rem(nth, 2), 4 * sizes.half)
    for side in range(min(2, sizes.rows)):
        column = add(mul(at.column, 2), side)
        with utils.when(less(column, sizes.rows)):
            for half in range(2):
                line = add(mul(at.warp, UNIT), add(at.row, 8 * half))
                store(shared, add(base, mul(add(mul(line, sizes.rows), column), 4)), acc[2 * half + side])
    meet()
    with utils.when(less(at.thread, phase.results * sizes.rows)):
        output, row = rem(at.thread, phase.results), div(at.thread, phase.results)
        y = _total(sizes, shared, base, output, row)
        if phase.gated:
            up = _total(sizes, shared, base, add(output, 8), row)
            share = asm("rcp.approx.ftz.f32 $0, $1;", arith.addf(f32(1.0), lanes.exp2(arith.mulf(y, f32(-LOG2E)))))
            y = arith.mulf(_rounded(arith.mulf(y, share)), up)
        width = phase.units * phase.results
        where = mul(add(mul(row, width), add(mul(unit, phase.results), output)), 2)
        if residual is not None:
            [old] = load(utils.memref_ptr(residual), where, 1, ir.BF16Type.get())
            y = arith.addf(y, arith.extf(_f32(), old))
        store(to, where, arith.truncf(ir.BF16Type.get(), y))


def _total(sizes: Sizes, shared: Value, base: Value, output: Value, row: Value) -> Value:
    """What all warps have of one output, as a product's result is rounded."""
    total = None
    for warp in range(WARPS):
        line = add(mul(add(output, UNIT * warp), sizes.rows), row)
        [x] = load(shared, add(base, mul(line, 4)), 1, _f32())
        total = x if total is None else arith.addf(total, x)
    return _rounded(total)


def _normed(sizes: Sizes, phase: Phase, words, rows: range, sums: Value, scale):
    """RMSNorm of `rows`, from words and to words of two numbers."""
    shared, thread = utils.memref_ptr(sums), utils.thread_idx()
    for row, some in zip(rows, words, strict=True):
        total = f32(0.0)
        for i, four in enumerate(some):
            part = f32(0.0)
            for x in (x for word in four for x in pair(word)):
                part = arith.addf(part, arith.mulf(x, x))
            total = arith.addf(total, arith.select(_inside(phase, i), part, f32(0.0)))
        for distance in (1, 2, 4, 8, 16):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        with utils.when(equal(rem(thread, 32), 0)):
            store(shared, mul(add(div(thread, 32), 2 * sizes.half + WARPS * row), 4), total)
    meet()
    found = []
    for row, some in zip(rows, words, strict=True):
        squares = [load(shared, i32(4 * (2 * sizes.half + WARPS * row + i)), 1, _f32())[0] for i in range(WARPS)]
        total = squares[0]
        for x in squares[1:]:
            total = arith.addf(total, x)
        mean = arith.mulf(total, f32(1.0 / phase.inputs))
        by = asm("rsqrt.approx.ftz.f32 $0, $1;", arith.addf(mean, f32(sizes.eps)))
        found.append([])
        for i, four in enumerate(some):
            pairs = [[arith.mulf(arith.mulf(x, by), scale[i][2 * j + k]) for k, x in enumerate(pair(word))]
                     for j, word in enumerate(four)]  # fmt: skip
            found[-1].append([lanes.packed(b, a) for a, b in pairs])
    return found


def _read(phase: Phase, source: Value, row: int, nth: int) -> list[Value]:
    """Sixteen bytes of a row."""
    place = arith.select(_inside(phase, nth), _place(nth), i32(0))
    offset = add(mul(place, 16), 2 * row * phase.inputs)
    at = utils.getelementptr(utils.memref_ptr(source), [offset], ir.IntegerType.get_signless(8))
    text = "ld.global.cg.v4.u32 {$0,$1,$2,$3}, [$4];"
    return list(lanes.inline_ptx(text, at, result_types=(_i32(),) * 4, has_side_effects=True))


def _each(phase: Phase) -> int:
    """Pieces of 16 bytes of a row that a thread brings."""
    return -(-phase.inputs // (8 * THREADS))


def _place(nth: int) -> Value:
    return add(utils.thread_idx(), THREADS * nth)


def _inside(phase: Phase, nth: int) -> Value:
    return less(_place(nth), phase.inputs // 8)


def pair(word: Value) -> tuple[Value, Value]:
    """Two bfloat16 numbers as float32."""
    f = _f32()
    return arith.bitcast(f, arith.shli(word, i32(16))), arith.bitcast(f, arith.andi(word, i32(0xFFFF0000)))


def _rounded(x: Value) -> Value:
    return arith.extf(_f32(), arith.truncf(ir.BF16Type.get(), x))


def equal(a: Value, b: int) -> Value:
    """Whether an integer is `b`."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, i32(b))


def less(a: Value, b: int) -> Value:
    """Whether an integer is from 0 to below `b`."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, i32(b))


def _f32():
    return ir.F32Type.get()


def _i32():
    return ir.IntegerType.get_signless(32)
