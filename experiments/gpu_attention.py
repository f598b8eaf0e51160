"""Decode attention on a GPU: our kernel and its peers in turns, against the time to read K/V at the copy's speed.

Inputs take turns so that none is in cache. A kernel that is not the float32 reference's equal is refused. The bytes
that a share counts are those of K/V as the kernel reads them: of codes and their scales where these are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp

from experiments.gpu_timing import parse_work, require_gpu
from experiments.registry import Progress, Row
from kernels.decode_attention import chosen, decode_attention
from kernels.decode_packed import chosen_packed, decode_packed
from kernels.decode_plan import plan
from kernels.packed import Packed, dequantize, quantize
from kernels.reference import Mask, attend
from kvjax.accelerate import rates
from kvjax.accelerate.timing import COLD, microseconds

FAR = 1e-2
"""Largest error allowed, as a share of the result's norm: bfloat16 sums of bfloat16 products stay under 3e-3."""


@dataclass(frozen=True)
class Config:
    """The fields of `gpu_attention.yaml`.

    Args:
        works: `BATCHxCONTEXT`: rows, and tokens each has in the cache.
        kernels: names of `KERNELS`.
        heads: query heads.
        kv_heads: K/V heads.
        head_dim: channels of a head.
        dtype: of queries, keys and values.
        calls: of each kernel in a turn.
        turns: in which the kernels follow each other.
    """

    works: tuple[str, ...]
    kernels: tuple[str, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    calls: int = 24
    turns: int = 3

    def __post_init__(self):
        if unknown := [name for name in self.kernels if name not in KERNELS]:
            raise ValueError(f"gpu_attention: `kernels` must be among {', '.join(KERNELS)}, got {unknown}")
        for name in self.works:
            parse_work("gpu_attention", name)
        for name in ("calls", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"gpu_attention: `{name}` must be at least 1, got {getattr(self, name)}")


def run(config: Config, progress: Progress) -> list[Row]:
    """A row for each work and kernel."""
    require_gpu("gpu_attention")
    bandwidth = rates.bandwidth("add", "gpu")
    rows: list[Row] = []
    for i, work in enumerate(config.works):
        progress(work, i / len(config.works))
        rows += _measure(config, *parse_work("gpu_attention", work), bandwidth)
    return rows


def _measure(config: Config, batch: int, context: int, bandwidth: float) -> list[Row]:
    size = 2 * batch * context * config.kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    fewest = min(FEWER.get(name, 8 * jnp.dtype(config.dtype).itemsize) for name in config.kernels)
    least = size * fewest // (8 * jnp.dtype(config.dtype).itemsize)
    keys = jax.random.split(jax.random.key(batch * context), 3 * max(1, -(-COLD // least)))
    draws = [_draw(config, batch, context, keys[i : i + 3]) for i in range(0, len(keys), 3)]
    contenders = {name: KERNELS[name](config, batch, context) for name in config.kernels}
    ready = {name: [arrange(*draw) for draw in draws] for name, (arrange, _) in contenders.items()}
    compiled = {name: jax.jit(call).lower(*ready[name][0]).compile() for name, (_, call) in contenders.items()}
    errors = {
        name: _error(config, call(*ready[name][0]), _meant(ready[name][0], draws[0])) for name, call in compiled.items()
    }
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(ready[name][0][1:3])) for name in compiled}
    if far := {name: error for name, error in errors.items() if not error < FAR}:
        raise RuntimeError(f"gpu_attention: at {batch}x{context} expected relative errors below {FAR}, got {far}")
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(config.turns):
        for name, call in compiled.items():
            times[name] += microseconds(call, ready[name], config.calls)
    return [
        {
            "kernel": name.partition(" ")[0],
            "batch": batch,
            "context": context,
            "dtype": name.partition(" ")[2] or config.dtype,
            "us": median(us),
            "share_of_ceiling": sizes[name] / bandwidth / (1e-6 * median(us)),
            "range": [min(us), max(us)],
            "error": errors[name],
            "ceiling_GB_s": bandwidth / 1e9,
        }
        for name, us in times.items()
    ]


def _draw(config: Config, batch: int, context: int, keys):
    """Queries as a step has them, keys and values as `Dense` keeps them."""
    kept = (batch * config.kv_heads, context, config.head_dim)
    shapes = ((batch, 1, config.heads, config.head_dim), kept, kept)
    return [jax.random.normal(key, shape, config.dtype) for key, shape in zip(keys, shapes, strict=True)]


def _meant(ready, draw):
    """Queries, keys and values that a kernel was given: what its codes stand for, if they are codes."""
    return [draw[0], *(dequantize(x) for x in ready[1:3])] if isinstance(ready[1], Packed) else draw


def _places(batch: int, context: int):
    slots = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), (batch, context))
    return jnp.full((batch, 1), context - 1, jnp.int32), slots


def _error(config: Config, out, draw) -> float:
    batch, context = draw[0].shape[0], draw[1].shape[1]
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in draw]
        want, _ = jax.jit(attend, static_argnums=5)(*wide, *_places(batch, context), Mask(config.head_dim**-0.5))
    return float(jnp.linalg.norm(out.astype(jnp.float32).reshape(want.shape) - want) / jnp.linalg.norm(want))


def _sizes(config: Config, batch: int, context: int) -> tuple[int, int, int, int]:
    """By which a tiling is chosen."""
    return config.head_dim, config.heads // config.kv_heads, batch * config.kv_heads, context


def _ours(config: Config, batch: int, context: int):
    """The plan is made once a step for all layers, so it is not in the time."""
    mask, tiling = Mask(config.head_dim**-0.5), chosen(*_sizes(config, batch, context))
    at, slots = _places(batch, context)
    work = jax.jit(plan, static_argnums=(2, 3, 4))(at, slots, mask, config.kv_heads, tiling)

    def call(q, k, v, at, slots, work):
        return decode_attention(q, k, v, at, slots, mask, work=work, tiling=tiling)[0]

    return lambda q, k, v: (q, k, v, at, slots, work), call


def _packed(bits: int):
    def contender(config: Config, batch: int, context: int):
        """One float16 scale a token for keys and for values; the plan as in `_ours`."""
        mask, tiling = Mask(config.head_dim**-0.5), chosen_packed(*_sizes(config, batch, context), bits)
        at, slots = _places(batch, context)
        work = jax.jit(plan, static_argnums=(2, 3, 4))(at, slots, mask, config.kv_heads, tiling)
        pack = jax.jit(lambda x: quantize(x, bits))

        def call(q, k, v, at, slots, work):
            return decode_packed(q, k, v, at, slots, mask, work=work, tiling=tiling)[0]

        return lambda q, k, v: (q, pack(k), pack(v), at, slots, work), call

    return contender


def _cudnn(config: Config, batch: int, context: int):
    """NVIDIA cuDNN through JAX, which wants tokens before heads."""

    def arrange(q, k, v):
        return q, *(x.reshape(batch, config.kv_heads, context, -1).swapaxes(1, 2) for x in (k, v))

    return arrange, lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _einsum(config: Config, batch: int, context: int):
    """Two products and a softmax, as XLA compiles them."""

    def call(q, k, v):
        q = q.reshape(batch * config.kv_heads, -1, config.head_dim)
        logits = jnp.einsum("rgd,rtd->rgt", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * config.head_dim**-0.5, -1).astype(v.dtype)
        return jnp.einsum("rgt,rtd->rgd", weights, v)

    return lambda q, k, v: (q, k, v), call


FEWER = {"kvjax int8": 8, "kvjax int4": 4, "kvjax int2": 2}
"""Bits of a number in kernels that read codes; these are held against float32 attention to what the codes stand for."""

KERNELS: dict[str, Callable] = {
    "kvjax": _ours,
    "cuDNN": _cudnn,
    "einsum": _einsum,
    **{name: _packed(bits) for name, bits in FEWER.items()},
}
"""From config, batch and context to a function that arranges a draw and one that attends to what it gives."""
