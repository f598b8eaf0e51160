"""`x @ kernel.T` in the form that XLA runs fastest for the number of rows at hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_ROWS = 32
SMALL = 1 << 19
"""Weights of a kernel below which XLA multiplies a vector by it on one core of a CPU."""

Rows = Float[Array, "batch width inputs"]
Kernel = Float[Array, "outputs inputs"]


def product(x: Rows, kernel: Kernel, *, whole: bool = False) -> Float[Array, "batch width outputs"]:
    """Multiply every row by a kernel stored `[out, in]`.

    On a CPU the kernel of a few rows is cut into two halves of its outputs, as a batch of two: XLA then uses
    both cores for a small one, and a faster path for a few rows (71 to 45 ms a step at two rows, 64 to 45 ms at 16).
    Not if it is to stay `whole`, as one that several devices share, which XLA cuts.
    """
    few = 1 < x.shape[0] * x.shape[1] <= FEW_ROWS
    single_small = x.shape[0] * x.shape[1] == 1 and kernel.size <= SMALL
    if whole or kernel.shape[0] % 2 or not (few or single_small):
        return _whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_halves_left if few else _halves, default=_whole)


def _whole(x: Rows, kernel: Kernel):
    return jax.lax.dot_general(x, kernel, (((2,), (1,)), ((), ())))


def _halves(x: Rows, kernel: Kernel):
    halves = kernel.reshape(2, -1, kernel.shape[1])
    y = jax.lax.dot_general(_twice(x), halves, (((2,), (2,)), ((0,), (0,))))
    return y.swapaxes(0, 1).reshape(*x.shape[:2], -1)


def _halves_left(x: Rows, kernel: Kernel):
    halves = kernel.reshape(2, -1, kernel.shape[1])
    y = jax.lax.dot_general(halves, _twice(x), (((2,), (2,)), ((0,), (0,))))
    return y.reshape(kernel.shape[0], -1).T.reshape(*x.shape[:2], -1)


def _twice(x: Rows) -> Float[Array, "2 rows inputs"]:
    rows = x.reshape(-1, x.shape[2])
    return jnp.broadcast_to(rows[None], (2, *rows.shape))
