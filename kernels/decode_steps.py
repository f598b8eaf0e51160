"""A tile of packed keys and values, seen by the threads of some warps; and what they and the workers saw, merged."""

from __future__ import annotations

import math

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels import decode_lanes as lanes
from kernels.decode_lanes import TOGETHER, Lane, Shape, Value, across, add, asm, div, f32, i32, load, mul, rem, store
from kernels.decode_parts import LOG2E
from kernels.reference import EIGHT, Mask

BARRIER = 9
"""Of the hardware's sixteen, the one where all scoring warps meet; JAX uses those below it."""


def step(shape: Shape, mask: Mask, k, v, slots, scales, offsets, fixed: list[Value], state: list[Value]) -> list[Value]:
    """The state after a tile: each warp takes every `warps`-th sixteen rows of bytes.

    Args:
        k, v: codes in shared memory, as the copy engine laid them.
        scales, offsets: of keys and of values, two vectors of the tile's tokens; `offsets` may be None.
    """
    at = lanes.here()
    for i in range(shape.rows // (TOGETHER * shape.warps)):
        unit = mul(add(at.warp, i * shape.warps), TOGETHER)
        logits, tokens = _logits(shape, mask, at, unit, k, slots, scales[0], offsets and offsets[0], fixed)
        state = _raised(shape, logits, state)
        weights, state = _weights(shape, logits, tokens, scales[1], offsets and offsets[1], state)
        state = _mixed(shape, at, unit, v, weights, state)
    return state


def _logits(shape: Shape, mask: Mask, at: Lane, unit, k, slots, scales, offsets, fixed):
    """Of each place of a code in its byte, two tokens and this thread's queries; and the tokens."""
    count = shape.dim // 8 * shape.eights
    queries = fixed[:count]
    sums = [arith.bitcast(ir.F32Type.get(), x) for x in fixed[count : count + 2 * shape.eights]]
    asks = fixed[count + 2 * shape.eights :]
    base, start = utils.memref_ptr(k), mul(unit, shape.dim)
    acc = [[_first(shape, i, sums[2 * e : 2 * e + 2]) for e in range(shape.eights)] for i in range(shape.per)]
    odd = [[[f32(0.0)] * 4 for _ in range(shape.eights)] for _ in range(shape.per)]
    for nth, chunk in enumerate(lanes.key_chunks(shape, at)):
        low, high = (load(base, add(start, lanes.place(shape, add(at.row, r), chunk)), 4) for r in (0, 8))
        for word in range(4):
            pairs = zip(lanes.key_pairs(shape, low[word]), lanes.key_pairs(shape, high[word]), strict=True)
            for i, ((a, c), (b, d)) in enumerate(pairs):
                for e in range(shape.eights):
                    first = shape.dim // 8 * e + 8 * nth + 2 * word
                    into = acc if shape.per > 1 or word % 2 else odd  # two chains, for neither then waits so long
                    into[i][e] = lanes.product(into[i][e], [a, b, c, d], queries[first : first + 2])
    logits, tokens = [], []
    for i in range(shape.per):
        for half in range(2):
            row = add(unit, add(at.row, 8 * half))
            token = add(add(mul(div(row, shape.span), shape.span * shape.per), rem(row, shape.span)), i * shape.span)
            [held] = load(utils.memref_ptr(slots), mul(token, 4))
            scale = arith.mulf(lanes.number(scales, token), f32(logit_unit(mask) / lanes.factor(shape, i)))
            offset = arith.mulf(lanes.number(offsets, token), f32(logit_unit(mask))) if offsets is not None else None
            each = []
            for c in range(2 * shape.eights):
                e, side = divmod(c, 2)
                x = acc[i][e][2 * half + side]
                if shape.per == 1:
                    x = arith.addf(x, odd[i][e][2 * half + side])
                x = arith.mulf(x, scale)
                if offset is not None:
                    x = arith.addf(x, arith.mulf(offset, sums[c]))
                each.append(masked(mask, x, held, asks[c]))
            logits.append(each)
            tokens.append((token, held))
    return logits, tokens


def _first(shape: Shape, place: int, sums: list[Value]) -> list[Value]:
    """What the products start from, so that a code's centre and the 128 under it add nothing."""
    if shape.bits == 8:
        return [f32(0.0)] * 4
    base = f32(-128.0 - 2 ** (shape.bits - 1) * lanes.factor(shape, place))
    return [arith.mulf(x, base) for x in sums] * 2


def logit_unit(mask: Mask) -> float:
    """What products are multiplied by: the exponential has base 2, and a cap's hyperbolic tangent is made of one."""
    return mask.scale * LOG2E * (1.0 if mask.softcap is None else 2.0 / mask.softcap)


def masked(mask: Mask, x: Value, held: Value, edge: Value) -> Value:
    """The logit in units of `log 2`, -inf if the token is not seen; `edge` is the first position that never is."""
    if mask.softcap is not None:
        share = asm("rcp.approx.ftz.f32 $0, $1;", arith.addf(lanes.exp2(x), f32(1.0)))
        x = arith.mulf(arith.addf(arith.mulf(share, f32(-2.0)), f32(1.0)), f32(mask.softcap * LOG2E))
    less = arith.CmpIPredicate
    seen = arith.cmpi(less.ult, held, edge)  # unsigned: -1, an empty slot, is above every edge
    if mask.window is not None:
        near = arith.cmpi(less.sge, held, arith.subi(edge, i32(mask.window)))
        seen = arith.andi(seen, arith.ori(near, arith.cmpi(less.slt, held, i32(mask.sinks))))
    return arith.select(seen, x, f32(-math.inf))


def _raised(shape: Shape, logits, state: list[Value]) -> list[Value]:
    """The state over the peaks that the logits need: seldom new ones, so a branch."""
    columns = 2 * shape.eights
    peaks = state[shape.sums : shape.sums + columns]
    tops, above = [], None
    for c, peak in enumerate(peaks):
        top = logits[0][c]
        for each in logits[1:]:
            top = arith.maxnumf(top, each[c])
        higher = arith.cmpf(arith.CmpFPredicate.OGT, top, peak)
        above = higher if above is None else arith.ori(above, higher)
        tops.append(top)
    i1 = ir.IntegerType.get_signless(1)
    some = asm("vote.sync.any.pred $0, $1, 0xffffffff;", above, result=i1, together=True)

    def rescale():
        new = [arith.maxnumf(p, across(top, arith.maxnumf)) for p, top in zip(peaks, tops, strict=True)]
        old = [lanes.exp2(arith.subf(p, n)) for p, n in zip(peaks, new, strict=True)]
        sums = [arith.mulf(x, old[2 * (i // 4 % shape.eights) + i % 2]) for i, x in enumerate(state[: shape.sums])]
        rest = [arith.mulf(x, old[i % columns]) for i, x in enumerate(state[shape.sums + columns :])]
        return sums + new + rest

    return lanes.choose(some, rescale, lambda: state, [ir.F32Type.get()] * len(state))


def _weights(shape: Shape, logits, tokens, scales, offsets, state: list[Value]):
    """Fragments of the weights times the values' scales, and the state with their totals."""
    columns = 2 * shape.eights
    peaks = state[shape.sums : shape.sums + columns]
    totals, shifts = state[shape.sums + columns : -columns], state[-columns:]
    packed = []
    for each, (token, held) in zip(logits, tokens, strict=True):
        there = arith.cmpi(arith.CmpIPredicate.sge, held, i32(0))
        scale = arith.select(there, lanes.number(scales, token), f32(0.0))
        offset = None if offsets is None else arith.select(there, lanes.number(offsets, token), f32(0.0))
        scaled = []
        for c, logit in enumerate(each):
            weight = lanes.exp2(arith.subf(logit, peaks[c]))
            totals[c] = arith.addf(totals[c], weight)
            scaled.append(arith.mulf(weight, scale))
            if offset is not None:
                shifts[c] = arith.addf(shifts[c], arith.mulf(weight, offset))
        packed.append([transposed(scaled[c + 1], scaled[c]) for c in range(0, columns, 2)])
    weights = [
        [[packed[2 * i][e], packed[2 * i + 1][e]] for e in range(shape.eights)] for i in range(shape.per)
    ]  # place, eight: two registers
    return weights, [*state[: shape.sums], *peaks, *totals, *shifts]


def transposed(high: Value, low: Value) -> Value:
    """Two queries of a token a thread, as two tokens of a query: what one product gives, as the next one takes it."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", lanes.packed(high, low), together=True)


def value_chunks(shape: Shape, at: Lane) -> list[Value]:
    """First channels of what a thread reads of a token: 16 each, or 8 if a head has 64."""
    if shape.dim == 64:
        return [mul(at.row, 8)]
    return [mul(add(at.row, 8 * i), 16) for i in range(shape.dim // 128)]


def _mixed(shape: Shape, at: Lane, unit, v, weights, state: list[Value]) -> list[Value]:
    """The state with the weighted values: of products of channels by tokens and tokens by queries."""
    base, start, words = utils.memref_ptr(v), mul(unit, shape.dim), 2 if shape.dim == 64 else 4
    state, nth = list(state), 0
    for channel in value_chunks(shape, at):
        rows = []
        for r in (0, 1, 8, 9):
            offset = lanes.place(shape, add(mul(at.column, 2), r), div(channel, 16))
            rows.append(load(base, add(add(start, offset), rem(channel, 16)), words))
        pairs = [
            [lanes.pick(rows[r][word], rows[r + 1][word], order) for r in (0, 2)]
            for word in range(words)
            for order in (0x5410, 0x7632)
        ]
        for i in range(shape.per):  # outside the channels, so that a product seldom waits for the one before
            for tile, pair in enumerate(pairs, nth):
                fragment = [
                    lanes.centred(shape, lanes.magic(shape, x, i + odd), i) for x in pair for odd in (0, shape.per)
                ]
                for e in range(shape.eights):
                    first = 4 * (tile * shape.eights + e)
                    state[first : first + 4] = lanes.product(state[first : first + 4], fragment, weights[i][e])
        nth += len(pairs)
    return state


def meet(shape: Shape) -> None:
    """Wait for all scoring warps."""
    lanes.inline_ptx(f"bar.sync {BARRIER}, {32 * shape.warps};", has_side_effects=True)


def spill(shape: Shape, state: list[Value], sums_ref, stats_ref) -> None:
    """Each warp's sums `[warps, queries, dim]`, and peaks, totals and shifts `[warps, 3, 8 * eights]`, to memory."""
    at, columns = lanes.here(), 2 * shape.eights
    sums, stats = utils.memref_ptr(sums_ref), utils.memref_ptr(stats_ref)
    words = 2 if shape.dim == 64 else 4
    for c in range(columns):
        e, side = divmod(c, 2)
        query = add(mul(at.column, 2), 8 * e + side)
        kept = [state[shape.sums + i * columns + c] for i in range(3)]
        kept[1:] = [across(x, arith.addf) for x in kept[1:]]
        for i, x in enumerate(kept):
            store(stats, mul(add(mul(at.warp, 3 * 8 * shape.eights), add(query, i * 8 * shape.eights)), 4), x)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, query, i32(shape.queries))):
            line = mul(add(mul(at.warp, shape.queries), query), shape.dim)
            for nth, channel in enumerate(value_chunks(shape, at)):
                for word in range(words):
                    tiles = [2 * (nth * words + word) + x for x in range(2)]
                    four = [state[4 * (t * shape.eights + e) + 2 * odd + side] for t in tiles for odd in range(2)]
                    store(sums, mul(add(line, add(channel, 4 * word)), 4), *four)
    meet(shape)


def collect(shape: Shape, sums: Value, stats: Value, out_ref, lse_ref) -> None:
    """Merge what the warps have spilled, from two places in memory, into `out` and `lse` of a row's queries."""
    at, some = lanes.here(), shape.queries * shape.dim // 4

    def one(nth: Value) -> None:
        query, channel = div(nth, shape.dim // 4), mul(rem(nth, shape.dim // 4), 4)
        kept = []
        for warp in range(shape.warps):
            line = add(mul(query, shape.dim), add(channel, warp * shape.queries * shape.dim))
            offsets = [mul(add(query, (3 * warp + i) * 8 * shape.eights), 4) for i in range(3)]
            peak, total, shift = (load(stats, x, type_=ir.F32Type.get())[0] for x in offsets)
            values = load(sums, mul(line, 4), 4, ir.F32Type.get())
            kept.append((peak, total, [arith.addf(x, shift) for x in values]))
        _finished(_joined(kept), query, channel, shape, out_ref, lse_ref)

    _shared(at, some, 32 * shape.warps, one)


def gather(shape: Shape, outs_ref, lses_ref, first: Value, count: Value, out_ref, lse_ref) -> None:
    """Merge `count` partial results, from the `first` on, by one warpgroup."""
    at, some = lanes.here(), shape.queries * shape.dim // 4
    outs, lses = utils.memref_ptr(outs_ref), utils.memref_ptr(lses_ref)

    def one(nth: Value) -> None:
        query, channel = div(nth, shape.dim // 4), mul(rem(nth, shape.dim // 4), 4)

        def several(start: Value, state: list[Value]) -> list[Value]:
            kept = []
            for i in range(EIGHT):  # asked for together
                there = arith.cmpi(arith.CmpIPredicate.ult, add(start, i), count)
                part = add(first, arith.select(there, add(start, i), i32(0)))
                line = add(mul(part, shape.queries), query)
                [lse] = load(lses, mul(line, 4), type_=ir.F32Type.get())
                lse = arith.maxnumf(arith.mulf(lse, f32(LOG2E)), f32(lanes.LEAST))
                values = load(outs, mul(add(mul(line, shape.dim), channel), 4), 4, ir.F32Type.get())
                kept.append((lse, arith.select(there, f32(1.0), f32(0.0)), values))
            return _joined([(state[0], state[1], state[2:]), *((lse, n, _times(x, n)) for lse, n, x in kept)])

        nothing = [f32(lanes.LEAST), f32(0.0), *[f32(0.0)] * 4]
        state = lanes.counted(i32(0), count, EIGHT, several, nothing)
        _finished(state, query, channel, shape, out_ref, lse_ref)

    _shared(at, some, 128, one)


def clear(shape: Shape, out_ref, lse_ref) -> None:
    """What queries get that see nothing."""

    def one(nth: Value) -> None:
        query, channel = div(nth, shape.dim // 4), mul(rem(nth, shape.dim // 4), 4)
        _put(shape, query, channel, [f32(0.0)] * 4, f32(-math.inf), out_ref, lse_ref)

    _shared(lanes.here(), shape.queries * shape.dim // 4, 128, one)


def _shared(at: Lane, some: int, threads: int, one) -> None:
    """Run `one` for each number below `some`, a thread each in turn."""
    for first in range(0, some, threads):
        nth = add(at.thread, first)
        if first + threads <= some:
            one(nth)
        else:
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, nth, i32(some))):
                one(nth)


def _joined(kept) -> list[Value]:
    """Softmaxes as one: of each a peak, a total and weighted values."""
    top = kept[0][0]
    for peak, _, _ in kept[1:]:
        top = arith.maxnumf(top, peak)
    total, sums = f32(0.0), [f32(0.0)] * 4
    for peak, some, values in kept:
        weight = lanes.exp2(arith.subf(peak, top))
        total = arith.addf(total, arith.mulf(weight, some))
        sums = [arith.addf(x, arith.mulf(y, weight)) for x, y in zip(sums, values, strict=True)]
    return [top, total, *sums]


def _times(values: list[Value], by: Value) -> list[Value]:
    return [arith.mulf(x, by) for x in values]


def _finished(state: list[Value], query, channel, shape: Shape, out_ref, lse_ref) -> None:
    """Divide by the total, and store."""
    top, total, *sums = state
    seen = arith.cmpf(arith.CmpFPredicate.OGT, top, f32(lanes.LEAST / 2))
    each = asm("rcp.approx.ftz.f32 $0, $1;", total)
    out = [arith.select(seen, arith.mulf(x, each), f32(0.0)) for x in sums]
    lse = arith.mulf(arith.addf(top, lanes.log2(total)), f32(math.log(2)))
    _put(shape, query, channel, out, arith.select(seen, lse, f32(-math.inf)), out_ref, lse_ref)


def _put(shape: Shape, query, channel, out: list[Value], lse: Value, out_ref, lse_ref) -> None:
    type_ = ir.MemRefType(out_ref.type).element_type
    if type_ != ir.F32Type.get():
        out = [arith.truncf(type_, x) for x in out]
    size = utils.bitwidth(type_) // 8
    store(utils.memref_ptr(out_ref), mul(add(mul(query, shape.dim), channel), size), *out)
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, channel, i32(0))):
        store(utils.memref_ptr(lse_ref), mul(query, 4), lse)
