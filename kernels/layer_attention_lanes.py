"""Attention of one new token, written for one thread of a warp: keys and values go from memory to registers.

Products are those of `mma.m16n8k16`, sixteen slots (for the values, channels) by eight queries. Which channel or slot
an index of the product stands for is free as long as both sides agree, so each thread reads 16 bytes at once. A warp
keeps its own softmax over every eighth sixteen slots of a worker's stretch.
"""

from __future__ import annotations

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels import decode_lanes as lanes
from kernels import decode_steps as steps
from kernels.decode_lanes import (
    Lane,
    Shape,
    Value,
    across,
    add,
    f32,
    i32,
    load,
    mul,
    pick,
    product,
    store,
)
from kernels.layer_attention import WITHIN, Sight
from kernels.layer_lanes import WARPS, arrive, equal, less, meet, pair


def shape(sight: Sight) -> Shape:
    """What merging needs to know."""
    return Shape(sight.dim, sight.group, WARPS, WITHIN, 8, 1)


def append(sight: Sight, head: Value, to: Value, qkv: Value, cos: Value, sin: Value, k: Value, v: Value) -> None:
    """A head's new key, turned, and its value into slot `to`, by the worker in whose stretch that is."""
    at, half = lanes.here(), sight.dim // 2
    source = utils.memref_ptr(qkv)
    with utils.when(less(at.thread, half)):
        first = add(mul(add(head, sight.heads), sight.dim), at.thread)
        a, b = (_wide(source, add(first, by)) for by in (0, half))
        c, s = (load(utils.memref_ptr(x), mul(at.thread, 4), 1, _f32())[0] for x in (cos, sin))
        turned = _turned(a, b, c, s)
        for by, x in zip((0, half), turned, strict=True):
            where = add(mul(to, sight.dim), add(at.thread, by))
            store(utils.memref_ptr(k), mul(where, 2), arith.truncf(ir.BF16Type.get(), x))
    with utils.when(arith.andi(arith.cmpi(arith.CmpIPredicate.uge, at.thread, i32(128)), less(at.thread, 128 + half))):
        nth = arith.subi(at.thread, i32(128))
        first = add(mul(add(head, sight.heads + sight.kv_heads), sight.dim), mul(nth, 2))
        [word] = load(source, mul(first, 2))
        store(utils.memref_ptr(v), mul(add(mul(to, sight.dim), mul(nth, 2)), 2), word)
    meet()


def attend(
    sight: Sight, head: Value, first: Value, stop: Value, position: Value, qkv, cos, sin, k, v, held
) -> list[Value]:
    """A thread's state after its warp saw its part of slots `first` to `stop`.

    That is sums, channels of two queries, then peaks and totals of these.
    """
    at = lanes.here()

    def tile(start: Value):
        return _tile(sight, at, start, stop, k, v, held)

    begin = add(first, mul(at.warp, WITHIN))
    early = tile(begin)  # asked for before the queries: most stretches are no longer than this
    queries = _queries(sight, at, head, qkv, cos, sin)
    edge = add(position, 1)
    state = [f32(0.0)] * (sight.dim // 4) + [f32(lanes.LEAST)] * 2 + [f32(0.0)] * 2
    state = _seen(sight, early, edge, queries, state)
    size = WARPS * WITHIN
    return lanes.counted(
        add(begin, size), stop, size, lambda start, state: _seen(sight, tile(start), edge, queries, state), state
    )


def leave(sight: Sight, state: list[Value], scratch: Value, out: Value, lse: Value) -> None:
    """Merge the warps' states, through shared memory, into one partial result of the group."""
    at, sums, group = lanes.here(), sight.dim // 4, sight.group
    base = utils.memref_ptr(scratch)
    stats = utils.getelementptr(base, [i32(4 * WARPS * group * sight.dim)], ir.IntegerType.get_signless(8))
    totals = [across(x, arith.addf) for x in state[sums + 2 :]]
    for side in range(2):
        query = add(mul(at.column, 2), side)
        for i, x in enumerate((state[sums + side], totals[side], f32(0.0))):
            store(stats, mul(add(mul(at.warp, 24), add(query, 8 * i)), 4), x)
        with utils.when(less(query, group)):
            line = mul(add(mul(at.warp, group), query), sight.dim)
            for tile in range(0, sight.dim // 16, 2):
                channel = add(mul(at.row, 8), 64 * (tile // 4) + 2 * (tile % 4))
                four = [state[4 * (tile + i) + 2 * odd + side] for i in range(2) for odd in range(2)]
                store(base, mul(add(line, channel), 4), *four)
    meet()
    steps.collect(shape(sight), base, stats, out, lse)


def merge(
    sight: Sight, first: Value, count: Value, counter: Value, ready: Value, flag: Value, outs, lses, out, lse
) -> None:
    """Count this worker up; the last of `count` merges their partial results, counts down to zero, and says so.

    Args:
        flag: one number of shared memory.
    """
    meet()
    thread = utils.thread_idx()
    with utils.when(equal(thread, 0)):
        store(utils.memref_ptr(flag), i32(0), arrive(utils.memref_ptr(counter)))
    meet()
    [before] = load(utils.memref_ptr(flag), i32(0))
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, add(before, 1), count)):
        with utils.when(less(thread, 128)):
            steps.gather(shape(sight), outs, lses, first, count, out, lse)
        meet()
        with utils.when(equal(thread, 0)):
            store(utils.memref_ptr(counter), i32(0), i32(0))
            arrive(utils.memref_ptr(ready))


def _queries(sight: Sight, at: Lane, head: Value, qkv, cos, sin) -> list[list[Value]]:
    """A thread's part of its query, turned: of each 32 channels eight, as four words."""
    group = arith.minui(at.row, i32(sight.group - 1))
    line = mul(add(mul(head, sight.group), group), sight.dim)
    source = utils.memref_ptr(qkv)
    pieces = [load(source, mul(add(line, add(mul(at.column, 8), 32 * p)), 2), 4) for p in range(sight.dim // 32)]
    half = len(pieces) // 2
    found: list[list[Value]] = [[] for _ in pieces]
    for p in range(half):
        channel = add(mul(at.column, 8), 32 * p)
        c, s = (
            [x for j in range(2) for x in load(utils.memref_ptr(ref), mul(add(channel, 4 * j), 4), 4, _f32())]
            for ref in (cos, sin)
        )
        for word in range(4):
            a, b = pair(pieces[p][word]), pair(pieces[p + half][word])
            low, high = (_turned(a[i], b[i], c[2 * word + i], s[2 * word + i]) for i in range(2))
            for to, i in ((p, 0), (p + half, 1)):
                found[to].append(lanes.packed(high[i], low[i]))
    return found


def _tile(sight: Sight, at: Lane, start: Value, stop: Value, k, v, held):
    """Of sixteen slots, a thread's part of keys and of values, and what the slots hold."""
    rows = [_row(add(start, add(at.row, by)), stop, held) for by in (0, 8)]
    mixed = [_row(add(start, add(mul(at.column, 2), by)), stop, held) for by in (0, 1, 8, 9)]
    keys = [_pieces(sight, k, row, mul(at.column, 8), 32) for row, _ in rows]
    values = [_pieces(sight, v, row, mul(at.row, 8), 64) for row, _ in mixed]
    return keys, values, [position for _, position in rows], [position for _, position in mixed]


def _seen(sight: Sight, tile, edge: Value, queries, state: list[Value]) -> list[Value]:
    """The state after sixteen slots."""
    sums = sight.dim // 4
    keys, values, rows, mixed = tile
    acc, odd = [f32(0.0)] * 4, [f32(0.0)] * 4
    for low, high, q in zip(*keys, queries, strict=True):
        acc = product(acc, [low[0], high[0], low[1], high[1]], q[:2])
        odd = product(odd, [low[2], high[2], low[3], high[3]], q[2:])
    scaled = [arith.mulf(arith.addf(a, b), f32(steps.logit_unit(sight.mask))) for a, b in zip(acc, odd, strict=True)]
    logits = [[steps.masked(sight.mask, scaled[2 * i + j], rows[i], edge) for j in range(2)] for i in range(2)]
    peaks, totals = state[sums : sums + 2], state[sums + 2 :]
    tops = [across(arith.maxnumf(a, b), arith.maxnumf) for a, b in zip(*logits, strict=True)]
    new = [arith.maxnumf(a, b) for a, b in zip(peaks, tops, strict=True)]
    old = [lanes.exp2(arith.subf(a, b)) for a, b in zip(peaks, new, strict=True)]
    weights = [[lanes.exp2(arith.subf(x, n)) for x, n in zip(each, new, strict=True)] for each in logits]
    totals = [
        arith.addf(arith.mulf(total, by), arith.addf(weights[0][i], weights[1][i]))
        for i, (total, by) in enumerate(zip(totals, old, strict=True))
    ]
    fragment = [steps.transposed(each[1], each[0]) for each in weights]
    there = [arith.cmpi(arith.CmpIPredicate.sge, position, i32(0)) for position in mixed]
    values = [
        [[arith.select(filled, word, i32(0)) for word in piece] for piece in pieces]
        for pieces, filled in zip(values, there, strict=True)
    ]
    found = []
    for chunk in range(sight.dim // 64):
        for word in range(4):
            a = [values[row][chunk][word] for row in range(4)]
            left = [pick(a[i], a[i + 1], order) for i in (0, 2) for order in (0x5410, 0x7632)]
            tile = 4 * (4 * chunk + word)
            before = [arith.mulf(state[tile + i], old[i % 2]) for i in range(4)]
            found += product(before, left, fragment)
    return found + new + totals


def _row(slot: Value, stop: Value, held: Value) -> tuple[Value, Value]:
    """A slot that there is, and the position it holds, -1 past the end of the stretch."""
    inside = arith.cmpi(arith.CmpIPredicate.slt, slot, stop)
    slot = arith.select(inside, slot, i32(0))
    [position] = load(utils.memref_ptr(held), mul(slot, 4))
    return slot, arith.select(inside, position, i32(-1))


def _pieces(sight: Sight, ref: Value, slot: Value, first: Value, apart: int) -> list[list[Value]]:
    """Of each `apart` channels of a slot eight, from `first` on."""
    line = mul(slot, sight.dim)
    return [load(utils.memref_ptr(ref), mul(add(line, add(first, i)), 2), 4) for i in range(0, sight.dim, apart)]


def _turned(a: Value, b: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    """A pair of channels by an angle."""
    first = arith.subf(arith.mulf(a, cos), arith.mulf(b, sin))
    return first, arith.addf(arith.mulf(b, cos), arith.mulf(a, sin))


def _wide(base: Value, index: Value) -> Value:
    """One bfloat16 number as float32."""
    [x] = load(base, mul(index, 2), 1, ir.BF16Type.get())
    return arith.extf(_f32(), x)


def _f32():
    return ir.F32Type.get()
