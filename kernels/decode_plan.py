"""Who reads which tile of slots: the split of decode attention's work, made once a step for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.reference import ROWS, Mask, visible


@dataclass(frozen=True)
class Tiling:
    """Sizes of the decode kernel; static, chosen by device and shape.

    Args:
        tile: slots that are read and scored at once, a multiple of 64.
        stages: tiles in flight from memory to each worker.
        workers: thread blocks, which share all tiles equally; all must run at once.
        whole: tiles that a worker takes at least where no row has more, for a merge would take longer.
    """

    tile: int = 64
    stages: int = 4
    workers: int = 132
    whole: int = 1

    def most(self, kv_heads: int) -> int:
        """Partial results a row has at most: a row holds a `kv_heads`-th of all tiles or less."""
        return min(self.workers, -(-self.workers // kv_heads) + 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Tiles in one row of work: those of row 0, then those of row 1, …, cut into one equal piece a worker.

    A tile that no query sees is in no piece. Where worker `w` meets row `r` there is one partial result, number
    `w + r`: from each to the next either the worker or the row goes up by one.

    Args:
        slots: the position each slot holds, -1 where it is empty and in the padding of the last tile.
        tiles: of each row, the numbers of the tiles that some query sees, those of its first worker, of its second, ….
            Workers take turns, so that at any time a row is read in one place: 2 % faster than a stretch for each.
        counts: how many these are.
        pieces: of each worker, its first row, the row after its last, the first tile in the former, the tile after
            its last in the latter, how many workers share its last row, and the numbers of its first tiles.
        asks: the position of each query of a K/V head, over and over.
        arrived: of each row, how many workers have left a partial result that is not yet merged. The kernel counts up
            and back to zero, which saves filling it with zeros (1 µs) at each call; so no two calls with one plan
            may run at the same time, as a model's layers never do, nor independent kernels of one XLA program.
    """

    __no_type_check__ = True  # read by jaxtyping's import hook in the tests: inside JAX leaves may be placeholders
    slots: Int[Array, "batch padded"]
    tiles: Int[Array, "rows tiles"]
    counts: Int[Array, "batch"]
    pieces: Int[Array, "workers numbers"]
    asks: Int[Array, "batch queries"]
    arrived: Int[Array, "rows"]


def plan(
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    kv_heads: int,
    tiling: Tiling,
) -> Plan:
    """Share the tiles that some query sees among the workers, equally whatever the lengths in the batch.

    Source: stream-K decomposition, Osama et al. 2023 (arXiv:2301.03598); blocks of keys as in arXiv:2205.14135.
    """
    batch, held = slots.shape
    count = -(-held // tiling.tile)
    slots = jnp.pad(slots, ((0, 0), (0, count * tiling.tile - held)), constant_values=-1).astype(jnp.int32)
    seen = visible(positions, slots, mask).any(1).reshape(batch, count, tiling.tile).any(2)
    order = jnp.where(seen, jnp.cumsum(seen, axis=1, dtype=jnp.int32) - 1, count)
    number = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), seen.shape)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    tiles = jnp.zeros((batch, count), jnp.int32).at[rows, order].set(number, mode="drop")
    counts = seen.sum(1, dtype=jnp.int32)
    begin, end, edges = _edges(counts, kv_heads, tiling)
    tiles = jnp.take_along_axis(jnp.repeat(tiles, kv_heads, 0), _turns(begin, end, jnp.maximum(edges[1], 1), count), 1)
    low, high = edges[:-1], edges[1:]
    first = (end[None] <= low[:, None]).sum(1, dtype=jnp.int32)
    stop = jnp.where(high > low, (begin[None] < high[:, None]).sum(1, dtype=jnp.int32), first)
    last = jnp.maximum(stop - 1, 0)
    sharing = ((low[None] < end[last][:, None]) & (high[None] > begin[last][:, None])).sum(1, dtype=jnp.int32)
    entry = jnp.minimum(first, begin.size - 1)
    enter = jnp.maximum(low - begin[entry], 0)
    ahead = jnp.minimum(enter[:, None] + jnp.arange(tiling.stages, dtype=jnp.int32)[None], count - 1)
    start = tiles[entry[:, None], ahead]
    pieces = jnp.concatenate([jnp.stack([first, stop, enter, high - begin[last], sharing], axis=1), start], axis=1)
    asks = jnp.tile(positions.astype(jnp.int32), (1, -(-ROWS // positions.shape[1])))[:, :ROWS]
    none = (jnp.repeat(counts, kv_heads) < 0).astype(jnp.int32)  # plain zeros would be a constant of the program
    return Plan(slots, tiles, counts, pieces, asks, none)


def partials(work: Plan, kv_heads: int, tiling: Tiling) -> Int[Array, "rows parts"]:
    """Numbers of each row's partial results, -1 for none."""
    begin, end, edges = _edges(work.counts, kv_heads, tiling)
    ahead = (edges[None, 1:] <= begin[:, None]).sum(1, dtype=jnp.int32)
    worker = ahead[:, None] + jnp.arange(tiling.most(kv_heads), dtype=jnp.int32)[None]
    near = jnp.minimum(worker, tiling.workers - 1)
    shared = jnp.minimum(edges[near + 1], end[:, None]) > jnp.maximum(edges[near], begin[:, None])
    row = jnp.arange(begin.size, dtype=jnp.int32)[:, None]
    return jnp.where(shared & (worker < tiling.workers), worker + row, -1)


def _edges(counts: Int[Array, "batch"], kv_heads: int, tiling: Tiling):
    """Where each row begins and ends, and where workers' pieces meet; surplus workers come last and get nothing."""
    each = jnp.repeat(counts, kv_heads, total_repeat_length=counts.size * kv_heads)
    end = jnp.cumsum(each, dtype=jnp.int32)
    least = jnp.where(counts.max() <= tiling.whole, tiling.whole, 1)
    piece = jnp.maximum(-(-end[-1] // tiling.workers), least)
    return end - each, end, jnp.minimum(jnp.arange(tiling.workers + 1, dtype=jnp.int32) * piece, end[-1])


def _turns(begin: Int[Array, "rows"], end: Int[Array, "rows"], piece: Int[Array, ""], count: int):
    """Which of its row's visible tiles each place in a worker's piece is: `[rows, count]`.

    In turn `i` each worker that has more than `i` tiles of the row takes the next one.
    """
    begin, each = begin[:, None], (end - begin)[:, None]
    first = jnp.minimum(piece - begin % piece, each)
    whole = jnp.maximum(each - first - 1, 0) // piece
    last = each - first - whole * piece
    place = jnp.arange(count, dtype=jnp.int32)[None]
    worker = jnp.where(place < first, 0, 1 + (place - first) // piece)
    turn = jnp.where(place < first, place, (place - first) % piece)
    before = jnp.minimum(first, turn) + jnp.minimum(last, turn) + whole * turn
    ahead = jnp.where(worker > 0, worker - (first <= turn).astype(jnp.int32), 0)
    return jnp.where(place < each, before + ahead, place)
