"""Attention to slots, by the kernel that suits device and shape: what `kvjax.cache` calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from jaxtyping import Array, Float, Int

from kernels import dispatch, reference
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
        mask: its `backend` None takes `mosaic` where many slots are seen on a Hopper GPU, else `xla`.
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
    if k.shape[1] < SLOTS or not dispatch.hopper():
        return "xla"
    if why := _suited(q, k)[0](q, k, v):
        dispatch.warn("attention is", why)
        return "xla"
    return "mosaic"


def _suited(q, k) -> tuple[Callable, Callable]:
    """The kernel for so many queries a K/V head: why it does not take these, and itself."""
    if q.shape[0] * q.shape[1] * q.shape[2] <= reference.ROWS * max(k.shape[0], 1):
        from kernels.decode_attention import decode_attention, refusal

        return refusal, decode_attention
    from kernels.prefill_attention import prefill_attention, refusal

    return refusal, prefill_attention


@cache
def _kernel(name: str, mask: Mask, interpret: Any) -> Callable:
    """A kernel as an operation; unless it was named, other devices than this have the reference."""
    written = partial({"attend": reference.attend, "append": reference.append}[name], mask=mask)

    def attend(q, k, v, positions, slots):
        return _suited(q, k)[1](q, k, v, positions, slots, mask, interpret=interpret)

    def append(*args):
        from kernels.decode_attention import decode_append

        return decode_append(*args, mask, interpret=interpret)

    kernel, keys = {"attend": (attend, (1, 2)), "append": (append, (3, 4))}[name]
    return dispatch.served(kernel, written, anywhere=mask.backend is not None, whole=keys)
