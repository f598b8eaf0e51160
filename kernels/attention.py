"""Attention to slots, by the kernel that suits device and shape: what `kvjax.cache` calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
from kernels.reference import BACKENDS, Mask, Partial

SLOTS = 256
"""Slots from which a kernel of its own pays: of 512 an H200's step of a small model took 0.95 ms, by XLA 1.07."""


def attend(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    *,
    interpret: Any = None,
) -> Partial:
    """What `kernels.reference.attend` gives: gradients, `vmap` and all.

    Args:
        mask: its `backend` None takes `mosaic` where a few queries meet many slots on a Hopper GPU, else `xla`.
        interpret: `plgpu.InterpretGPUParams()` runs `mosaic` on a CPU.
    Raises:
        ValueError: while tracing, for a backend asked for by name that does not take these shapes or dtypes.
    """
    if backend_of(q, k, v, mask.backend) == "xla":
        return reference.attend(q, k, v, positions, slots, mask)
    return _kernel("attend", mask, interpret)(q, k, v, positions, slots)


def append(
    q: Float[Array, "batch 1 heads head_dim"],
    new_k: Float[Array, "rows 1 head_dim"],
    new_v: Float[Array, "rows 1 head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch 1"],
    slots: Int[Array, "batch slots"],
    to: Int[Array, "batch"],
    mask: Mask,
    *,
    interpret: Any = None,
) -> tuple[
    Float[Array, "batch 1 heads head_dim"],
    Float[Array, "batch 1 heads"],
    Float[Array, "rows slots head_dim"],
    Float[Array, "rows slots head_dim"],
]:
    """What `kernels.reference.append` gives; arguments and errors as `attend` has them."""
    if backend_of(q, k, v, mask.backend) == "xla":
        return reference.append(q, new_k, new_v, k, v, positions, slots, to, mask)
    return _kernel("append", mask, interpret)(q, new_k, new_v, k, v, positions, slots, to)


def backend_of(q, k, v, asked: str | None = None) -> str:
    """What runs attention of these on the device at hand.

    Raises:
        ValueError: for a backend that there is not.
    """
    if asked not in (None, *BACKENDS):
        raise ValueError(f"attention: `backend` must be one of {', '.join(BACKENDS)} or None, got {asked!r}")
    if asked is not None:
        return asked
    queries = q.shape[0] * q.shape[1] * q.shape[2] // max(k.shape[0], 1)
    if k.shape[1] < SLOTS or queries > reference.ROWS or not hopper():
        return "xla"
    from kernels.decode_attention import refusal

    if why := refusal(q, k, v):
        _warn(why.partition(", got")[0], why)
        return "xla"
    return "mosaic"


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


_told: set[str] = set()


def _warn(kind: str, why: str) -> None:
    if kind not in _told:
        _told.add(kind)
        warnings.warn(f"attention is left to XLA: {why}", stacklevel=4)


@cache
def _kernel(name: str, mask: Mask, interpret: Any) -> Callable:
    """A kernel with the derivatives of the reference; under `vmap` the new axis joins the batch.

    Unless the backend was named, a program that is compiled for another device has the reference in its place.
    """
    from kernels import decode_attention

    written = partial({"attend": reference.attend, "append": reference.append}[name], mask=mask)
    kernels = {"attend": decode_attention.decode_attention, "append": decode_attention.decode_append}
    kernel = partial(kernels[name], mask=mask, interpret=interpret)
    keys = {"attend": slice(1, 3), "append": slice(3, 5)}[name]

    @jax.custom_batching.custom_vmap
    def run(*args):
        if mask.backend is not None:
            return kernel(*args)
        return jax.lax.platform_dependent(*args, cuda=kernel, default=written)

    @run.def_vmap
    def _(size, batched, *args):
        if not all(batched[keys]):  # a copy of keys and values for each would not fit
            parts = jax.vmap(written, tuple(0 if each else None for each in batched))(*args)
        else:
            args = [x if each else jnp.broadcast_to(x, (size, *x.shape)) for x, each in zip(args, batched, strict=True)]
            folded = run(*(x.reshape(-1, *x.shape[2:]) for x in args))
            parts = tuple(x.reshape(size, -1, *x.shape[1:]) for x in folded)
        return parts, (True,) * len(parts)

    differentiable = jax.custom_jvp(run)

    @differentiable.defjvp
    def _(args, tangents):
        moving = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of(*some):
            every = list(args)
            for i, x in zip(moving, some, strict=True):
                every[i] = x
            return written(*every)

        _, moved = jax.jvp(of, [args[i] for i in moving], [tangents[i] for i in moving])
        return differentiable(*args), moved

    return differentiable
