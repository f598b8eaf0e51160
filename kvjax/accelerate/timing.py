"""How long a call takes on inputs that are not in cache: by CUPTI's time stamps on a GPU, by the clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.accelerate.device import cache_bytes

COLD = 300_000_000
"""Bytes of inputs that take turns on a GPU: six times an H100's level-2 cache, so that no call finds its own there."""

LEAST = 2e-3
"""Seconds that the clock must run: shorter calls are repeated until they last as long, and the mean is taken."""


def cold_bytes(cache: int | None, platform: str) -> int:
    """Bytes of inputs after which none is left in a cache of `cache` bytes, None where that is unknown.

    Six times a GPU's second level, whose hashing keeps some lines longer than others; twice a processor's last, which
    other cores use too.
    """
    if platform == "cpu":
        return 2 * (cache or 32 * 2**20)
    return COLD if cache is None else 6 * cache


def microseconds(call: Callable[..., Any], inputs: Sequence[tuple], calls: int) -> list[float]:
    """Time of each of `calls` calls, whose inputs take turns. `call` is compiled, and donates nothing.

    On a GPU the time on the device, all kernels of a call summed, without the launches between them. Elsewhere the
    time until the result is there; calls shorter than `LEAST` are means over several, so that only inputs of
    `cold_bytes` together are cold. Each input is run once before, and on a GPU the cache is emptied after that.

    Raises:
        ValueError: without inputs, or for less than one call.
        RuntimeError: on a GPU, if calls ran different numbers of kernels.
    """
    if not inputs or calls < 1:
        raise ValueError(f"microseconds: expected inputs and at least 1 call, got {len(inputs)} and {calls}")
    measure = by_cupti if jax.default_backend() == "gpu" else by_clock
    return measure(call, inputs, calls)


def by_cupti(call: Callable[..., Any], inputs: Sequence[tuple], calls: int) -> list[float]:
    """`microseconds` on a GPU, by NVIDIA's CUPTI."""
    from jax._src.lib import mosaic_gpu  # public only for one call at a time, whose input would be in cache

    cupti = mosaic_gpu._mosaic_gpu_ext
    for args in inputs:
        jax.block_until_ready(call(*args))
    evict()
    cupti._cupti_init()
    try:
        out = None  # the last alone is kept: all of a large copy's would not fit
        for i in range(calls):
            out = call(*inputs[i % len(inputs)])
        jax.block_until_ready(out)
    finally:
        stamps = cupti._cupti_get_timings(False)
    return summed([ms for _, ms in stamps], calls)


def by_clock(call: Callable[..., Any], inputs: Sequence[tuple], calls: int) -> list[float]:
    """`microseconds` by the wall clock; on a CPU a few of them are the call's own way through Python."""
    for args in inputs:
        jax.block_until_ready(call(*args))
    turns = cycle(inputs)
    once = _seconds(call, turns, 1)
    each = max(1, round(LEAST / max(once, 1e-7)))
    return [1e6 * _seconds(call, turns, each) / each for _ in range(calls)]


def evict() -> None:
    """Read as many bytes that nobody needs as push all else out of the device's cache.

    They are read after they were written: lines that wait to be written back would slow the next call.
    """
    device = jax.local_devices()[0]
    jax.block_until_ready(_total(jnp.zeros(cold_bytes(cache_bytes(device), device.platform) // 4)))


def summed(ms: Sequence[float], calls: int) -> list[float]:
    """Microseconds of each call, from the milliseconds of each of its kernels in order.

    Raises:
        RuntimeError: if calls ran different numbers of kernels.
    """
    each, rest = divmod(len(ms), calls)
    if rest or not each:
        raise RuntimeError(f"microseconds: {calls} calls ran {len(ms)} kernels; expected a multiple of the calls")
    return [1e3 * sum(ms[i : i + each]) for i in range(0, len(ms), each)]


@jax.jit
def _total(x: Float[Array, "size"]) -> Float[Array, ""]:
    return x.sum()


def _seconds(call, turns: Iterator[tuple], each: int) -> float:
    begin = time.perf_counter()
    for _ in range(each):
        jax.block_until_ready(call(*next(turns)))
    return time.perf_counter() - begin
