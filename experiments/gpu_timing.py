"""How long kernels run on a GPU, without the launches between them: by the time stamps of NVIDIA's CUPTI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import jax
import jax.numpy as jnp

COLD = 300_000_000
"""Bytes of inputs that take turns: six times an H100's level-2 cache, so that no call finds its own there."""


def require_gpu(name: str) -> None:
    """Refuse to go on where JAX has no NVIDIA GPU.

    Raises:
        RuntimeError: naming the experiment.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"{name}: needs an NVIDIA GPU and `jax[cuda13]`; JAX runs on {jax.default_backend()} here")


def microseconds(call: Callable, inputs: Sequence[tuple], calls: int) -> list[float]:
    """Time on the device of each of `calls` calls, all its kernels summed; the inputs take turns.

    Raises:
        RuntimeError: if calls ran different numbers of kernels.
    """
    from jax._src.lib import mosaic_gpu  # public only for one call at a time, whose input would be in cache

    cupti = mosaic_gpu._mosaic_gpu_ext
    for args in inputs:
        jax.block_until_ready(call(*args))
    cupti._cupti_init()
    try:
        jax.block_until_ready([call(*inputs[i % len(inputs)]) for i in range(calls)])
    finally:
        stamps = cupti._cupti_get_timings(False)
    return summed([ms for _, ms in stamps], calls)


def summed(ms: Sequence[float], calls: int) -> list[float]:
    """Microseconds of each call, from the milliseconds of each of its kernels in order.

    Raises:
        RuntimeError: if calls ran different numbers of kernels.
    """
    each, rest = divmod(len(ms), calls)
    if rest or not each:
        raise RuntimeError(f"gpu_timing: {calls} calls ran {len(ms)} kernels; expected a multiple of the calls")
    return [1e3 * sum(ms[i : i + each]) for i in range(0, len(ms), each)]


def parse_work(name: str, work: str) -> tuple[int, int]:
    """Batch and context of a work.

    Raises:
        ValueError: if it is not `BATCHxCONTEXT`, naming the experiment.
    """
    batch, _, context = work.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
        raise ValueError(f"{name}: `works` must be BATCHxCONTEXT, such as 1x32768, got {work!r}")
    return int(batch), int(context)


def read_bandwidth(calls: int = 10) -> float:
    """Bytes a second at which rows of a large array are read and summed."""
    x = jax.random.normal(jax.random.key(0), (2**18, 4096), jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum(1))
    return x.nbytes / (1e-6 * median(microseconds(total, [(x,)], calls)))


def copy_bandwidth(calls: int = 10) -> float:
    """Bytes a second of a large copy, read and written, that no kernel bound by memory does much better than."""
    x = jax.random.normal(jax.random.key(0), (2**29,), jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    return 2 * x.nbytes / (1e-6 * median(microseconds(add, [(x,)], calls)))
