"""A kernel as an ordinary operation: other devices, derivatives and `vmap` are served by what it does in plain JAX."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def served(kernel: Callable, written: Callable, *, anywhere: bool = False, whole: tuple[int, ...] = ()) -> Callable:
    """`kernel` with the derivatives of `written`, which gives the same in plain JAX.

    A program that is compiled for another device than CUDA's has `written` in the kernel's place.

    Args:
        anywhere: run the kernel on any device: it was asked for by name, or is interpreted.
        whole: arguments of which each of a `vmap` needs its own for the new axis to join the batch, every argument's
            and result's first axis. Otherwise, and without any, `written` is mapped.
    """

    @jax.custom_batching.custom_vmap
    def run(*args):
        if anywhere:
            return kernel(*args)
        return jax.lax.platform_dependent(*args, cuda=kernel, default=written)

    @run.def_vmap
    def _(size, batched, *args):
        if not whole or not all(batched[i] for i in whole):
            parts = jax.vmap(written, tuple(0 if each else None for each in batched))(*args)
        else:
            args = [x if each else jnp.broadcast_to(x, (size, *x.shape)) for x, each in zip(args, batched, strict=True)]
            folded = run(*(x.reshape(-1, *x.shape[2:]) for x in args))
            parts = tuple(x.reshape(size, -1, *x.shape[1:]) for x in folded)
        return parts, (True,) * len(parts)

    differentiable = jax.custom_jvp(run)

    @partial(differentiable.defjvp, symbolic_zeros=True)
    def _(args, tangents):
        moving = [i for i, x in enumerate(tangents) if not isinstance(x, SymbolicZero)]

        def of(*some):
            every = list(args)
            for i, x in zip(moving, some, strict=True):
                every[i] = x
            return written(*every)

        _, moved = jax.jvp(of, [args[i] for i in moving], [tangents[i] for i in moving])
        return differentiable(*args), moved

    return differentiable


@cache
def hopper() -> bool:
    """Whether every NVIDIA GPU that JAX sees has the instructions that our kernels are made of, and JAX takes them."""
    if jax.__version_info__ < (0, 11, 2):
        return False
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    return all(device.compute_capability == "9.0" for device in devices)


def cores() -> int:
    """Multiprocessors of the smallest GPU at hand; of an H100 or H200 where there is none.

    Kernels whose workers wait for each other have at most as many, for all must run at once. A program that was traced
    elsewhere, for a larger GPU, waits for ever, and so do two that share one at a time (NVIDIA's MPS).
    """
    try:
        return min(device.core_count for device in jax.local_devices(backend="cuda"))
    except RuntimeError:
        return 132


_told: set[str] = set()


def warn(operation: str, why: str) -> None:
    """Say once for each kind of reason that an operation is left to XLA; `operation` goes with its verb."""
    kind = f"{operation}: {why.partition(', got')[0]}"
    if kind not in _told:
        _told.add(kind)
        warnings.warn(f"{operation} left to XLA: {why}", stacklevel=2)
