"""The least time that work can take on a device: its bytes at the memory's speed, its products, or its launches.

Source: Williams, Waterman & Patterson 2009, "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from kvjax.accelerate.facts import Facts

Limit = Literal["memory", "compute", "launch"]


@dataclass(frozen=True)
class Work:
    """What must be done at least, however it is written.

    Args:
        flops: floating-point operations, two for a multiplication and an addition.
        bytes: read from memory and written to it, each once.
        dtype: in which products run: the rate of `Facts.flops`.
        launches: kernels, one after the other.
    """

    flops: int
    bytes: int
    dtype: str = "bfloat16"
    launches: int = 1

    def __add__(self, other: Work) -> Work:
        """Both, in one program that reads and writes each one's bytes.

        Raises:
            ValueError: if their products run in different dtypes.
        """
        if self.dtype != other.dtype:
            raise ValueError(f"Work: expected work in one dtype, got {self.dtype} and {other.dtype}")
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.dtype, self.launches + other.launches)


@dataclass(frozen=True)
class Bound:
    """The least time for some work, and what makes it so.

    Args:
        seconds: the largest of the three times.
        limit: whose it is.
    """

    seconds: float
    limit: Limit

    def share(self, seconds: float) -> float:
        """What part of the bound a time of `seconds` reaches: 1 is the best there is."""
        return self.seconds / seconds


def bound(work: Work, facts: Facts) -> Bound:
    """The least time for `work` on a device.

    Raises:
        ValueError: if the device's rate in the work's dtype was not measured.
    """
    if work.dtype not in facts.flops:
        raise ValueError(f"bound: `work.dtype` must be among {', '.join(facts.flops)}, got {work.dtype!r}")
    times: dict[Limit, float] = {
        "memory": work.bytes / facts.bandwidth,
        "compute": work.flops / facts.flops[work.dtype],
        "launch": work.launches * facts.launch,
    }
    limit = max(times, key=lambda name: times[name])
    return Bound(times[limit], limit)


def product(rows: int, inputs: int, outputs: int, *, bits: int | None = None, dtype: str = "bfloat16") -> Work:
    """`x [rows, inputs] @ kernel.T [inputs, outputs]`, the kernel of `bits` a weight, those of `dtype` if None."""
    size = jnp.dtype(dtype).itemsize
    kernel = inputs * outputs * (8 * size if bits is None else bits) // 8
    return Work(2 * rows * inputs * outputs, kernel + size * rows * (inputs + outputs), dtype)


def decode_attention(
    batch: int,
    context: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int | None = None,
    scales: int = 0,
    window: int | None = None,
    sinks: int = 0,
    dtype: str = "bfloat16",
) -> Work:
    """One query a row to `context` tokens, its own among them, of which a window and some sinks may be all it sees.

    Args:
        bits: of a number in the cache, those of `dtype` if None.
        scales: bytes beside a token's codes, for a key as for a value: two of a float16 scale.
    """
    size = jnp.dtype(dtype).itemsize
    seen = context if window is None else min(context, window + sinks)
    token = head_dim * (8 * size if bits is None else bits) // 8 + scales
    ends = 2 * batch * heads * head_dim * size + 4 * batch * heads
    return Work(4 * batch * heads * seen * head_dim, 2 * batch * kv_heads * seen * token + ends, dtype)


def prefill_attention(
    batch: int,
    width: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    before: int = 0,
    window: int | None = None,
    dtype: str = "bfloat16",
) -> Work:
    """`width` queries a row, each to the `before` tokens in the cache, those ahead of it and itself.

    Queries, keys, values and results are read and written once: a perfect cache on the chip.
    """
    size = jnp.dtype(dtype).itemsize
    most = before + width if window is None else window
    full = max(0, before + width - most)  # queries that see `most`; the others see one more each
    full = min(full, width)
    growing = width - full
    pairs = full * most + growing * before + growing * (growing + 1) // 2
    kept = min(before + width, most + width - 1)
    moved = 2 * batch * width * heads * head_dim * size + 4 * batch * width * heads
    return Work(4 * batch * heads * pairs * head_dim, moved + 2 * batch * kv_heads * kept * head_dim * size, dtype)


def append(
    batch: int, *, kv_heads: int, head_dim: int, bits: int | None = None, scales: int = 0, dtype: str = "bfloat16"
) -> Work:
    """Keys and values of a token of each row, read in `dtype` and written in `bits` with `scales` bytes beside."""
    size = jnp.dtype(dtype).itemsize
    kept = head_dim * (8 * size if bits is None else bits) // 8 + scales
    return Work(0, 2 * batch * kv_heads * (head_dim * size + kept), dtype)


def norm(rows: int, features: int, *, dtype: str = "bfloat16") -> Work:
    """RMSNorm: rows read and written, a float32 scale; a square, a sum and two products for each number."""
    return Work(4 * rows * features, 2 * rows * features * jnp.dtype(dtype).itemsize + 4 * features, dtype)


def sampling(batch: int, vocab: int, *, dtype: str = "float32") -> Work:
    """A token from logits in `dtype`, read once: a difference, an exponential and a sum for each."""
    return Work(3 * batch * vocab, batch * (vocab * jnp.dtype(dtype).itemsize + 4), dtype)
