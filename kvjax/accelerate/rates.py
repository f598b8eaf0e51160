"""What a device can do at best, by programs that do nothing else: move bytes, multiply matrices, start."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from kvjax.accelerate.timing import microseconds

BYTES = {"cpu": 2**28, "gpu": 2**31}
"""Of an array that is read or copied, by platform: too many for any cache."""

COLUMNS = 4096
"""Of that array, so that a row is summed by one thread block or one core."""

FORMS = ("read", "add", "copy", "update")
"""In which memory is read, or read and written."""

EACH = 3
"""Calls between two looks at the clock."""

SIDE = {"cpu": {"float32": 2048, "bfloat16": 1024}, "gpu": {"float32": 8192, "bfloat16": 8192}}
"""Rows and columns of a product, by platform and dtype."""

CHAIN = (16, 80)
"""Dependent products in two programs, whose difference in time is what one of them takes."""


def bandwidth(form: str, platform: str, size: int | None = None, calls: int = 5) -> float:
    """Bytes a second at which an array of `size` bytes, more than any cache holds if None, is moved.

    Args:
        form: `"read"` sums rows and writes next to nothing. The others count bytes read and written: `"add"` makes a
            new array with XLA's own kernel, `"update"` changes one in place, and `"copy"` is the runtime's copy of a
            whole array, on an NVIDIA GPU its driver's. On a CPU those that make a new array pay for its pages.
    Raises:
        ValueError: for another form.
    """
    if form not in FORMS:
        raise ValueError(f"bandwidth: `form` must be one of {', '.join(FORMS)}, got {form!r}")
    size = BYTES.get(platform, BYTES["gpu"]) if size is None else size
    dtype = jnp.dtype("float32" if platform == "cpu" else "bfloat16")  # a CPU unpacks bfloat16
    shape = size // (dtype.itemsize * COLUMNS), COLUMNS
    x = (jax.lax.broadcasted_iota(jnp.int32, shape, 1) % 251).astype(dtype)
    if form == "read":
        return x.nbytes / _timed(lambda x: x.astype(jnp.float32).sum(1), x, calls)
    if form == "add":
        return 2 * x.nbytes / _timed(_one_more, x, calls)
    once = jnp.copy if form == "copy" else jax.jit(_one_more, donate_argnums=0)
    return 2 * x.nbytes / _clocked(once, x, calls)


def product_rate(platform: str, dtype: str, side: int | None = None, calls: int = 5) -> float:
    """Floating-point operations a second of a square product, two for each multiplication and addition.

    In float32 with the inputs rounded as JAX does by default on this device.
    """
    side = SIDE.get(platform, SIDE["gpu"])[dtype] if side is None else side
    pair = tuple(jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(1)))
    multiply = jax.jit(jnp.matmul).lower(*pair).compile()
    return 2 * side**3 / (1e-6 * min(microseconds(multiply, [pair], calls)))


def call_seconds(calls: int = 200) -> float:
    """Seconds from one call of a compiled program that does nothing to the next, as Python makes them."""
    x = jnp.zeros((8,), jnp.float32)
    step = jax.jit(lambda x: x + 1.0).lower(x).compile()

    def some() -> float:
        y, begin = x, time.perf_counter()
        for _ in range(calls):
            y = step(y)
        jax.block_until_ready(y)
        return (time.perf_counter() - begin) / calls

    some()
    return min(some() for _ in range(5))


def launch_seconds(calls: int = 20) -> float:
    """Seconds that each more kernel in a compiled program takes, if it has next to no work: a product of 32 by 32."""
    x = jnp.eye(32, dtype=jnp.float32)

    def chained(length: int, x):
        for _ in range(length):
            x = jnp.matmul(x, x)
        return x

    def once(length: int) -> float:
        step = jax.jit(partial(chained, length)).lower(x).compile()
        return min(_wall(step, x) for _ in range(calls))

    short, long = (once(length) for length in CHAIN)
    return max(long - short, 0.0) / (CHAIN[1] - CHAIN[0])


def _one_more(x: Shaped[Array, "rows columns"]) -> Shaped[Array, "rows columns"]:
    return x + jnp.ones((), x.dtype)


def _timed(call: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int) -> float:
    return 1e-6 * median(microseconds(jax.jit(call).lower(x).compile(), [(x,)], calls))


def _clocked(call: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int) -> float:
    """Seconds of a call, each given what the last one made, by the clock on any device.

    A copy by the driver is no kernel, so CUPTI has no stamps of it, and a donated input is gone after its call.
    """

    def some() -> float:
        nonlocal x
        begin = time.perf_counter()
        for _ in range(EACH):
            x = call(x)
        jax.block_until_ready(x)
        return (time.perf_counter() - begin) / EACH

    some()
    return median(some() for _ in range(calls))


def _wall(call: Callable, x: jax.Array) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call(x))
    return time.perf_counter() - begin
