"""A layer from its attention on, up to the products that the next layer's attention needs: one operation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.layer_attention import Cached, appended
from kernels.layer_attention import refusal as attention_refusal
from kernels.reference import BACKENDS, Mask

MOST_ROWS = 8
"""Columns of the hardware's product, which reads weights once for all."""

MEMORY = 227 * 1024
"""Bytes of shared memory that a thread block of a Hopper GPU may have."""

ALIGNED = 1024
"""Bytes that each array there takes a multiple of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """What the operation multiplies by; kernels are `[outputs, inputs]`.

    Args:
        out: of the attention.
        gate_up: the gates, then what they scale.
        following: of whatever comes next: queries, keys and values, or the head.
    """

    __no_type_check__ = True  # read by jaxtyping's import hook in the tests: inside JAX leaves may be placeholders
    out: Float[Array, "hidden attended"]
    mlp_norm: Float[Array, "hidden"]
    gate_up: Float[Array, "twice_intermediate hidden"]
    down: Float[Array, "hidden intermediate"]
    following_norm: Float[Array, "hidden"]
    following: Float[Array, "outputs hidden"]


Result = tuple[Float[Array, "rows hidden"], Float[Array, "rows outputs"]]
"""The residual stream after the layer, and what `following` gives of it."""


def layer_products(
    attended: Float[Array, "rows attended"],
    x: Float[Array, "rows hidden"],
    weights: Weights,
    *,
    eps: float,
    backend: str | None = None,
    interpret: Any = None,
) -> Result:
    """`x + out @ attended`, the gated MLP of that with its residual, and `following` of the result, normed.

    Norms are RMSNorm (arXiv:1910.07467), the gate is SwiGLU (arXiv:2002.05202).

    Args:
        backend: None takes `mosaic` for a few rows on a Hopper GPU, else `xla`.
        interpret: `plgpu.InterpretGPUParams()` runs `mosaic` on a CPU.
    Raises:
        ValueError: while tracing, for a backend asked for by name that does not take these shapes or dtypes.
    """
    if backend_of(attended, x, weights, backend) == "xla":
        return reference(attended, x, weights, eps)
    return _kernel(eps, backend is not None, interpret)(attended, x, weights)


def layer_step(
    qkv: Float[Array, "rows projected"],
    x: Float[Array, "rows hidden"],
    cached: Cached,
    weights: Weights,
    mask: Mask,
    *,
    eps: float,
    backend: str | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows outputs"], Array, Array]:
    """A whole layer of one new token a row: its attention to what is cached and to itself, then `layer_products`.

    Args:
        qkv: queries, keys and values of the new tokens, side by side, not turned yet.
    Returns:
        What `layer_products` gives, keys and values with the new token.
    Raises:
        ValueError: as `layer_products`.
    """
    if step_backend_of(qkv, x, cached, weights, backend) == "xla":
        return reference_step(qkv, x, cached, weights, mask, eps)
    return _step_kernel(mask, eps, backend is not None, interpret)(qkv, x, cached, weights)


def reference_step(qkv, x, cached: Cached, weights: Weights, mask: Mask, eps: float):
    """The same in plain JAX."""
    attended, k, v = appended(qkv, cached, mask)
    return *reference(attended, x, weights, eps), k, v


def reference(attended, x, weights: Weights, eps: float) -> Result:
    """The same in plain JAX, as a model's layers do it."""
    x = x + _product(attended, weights.out)
    gate, up = jnp.split(_product(normed(x, weights.mlp_norm, eps), weights.gate_up), 2, axis=-1)
    x = x + _product(jax.nn.silu(gate) * up, weights.down)
    return x, _product(normed(x, weights.following_norm, eps), weights.following)


def normed(x: Float[Array, "rows hidden"], scale: Float[Array, "hidden"], eps: float) -> Float[Array, "rows hidden"]:
    """RMSNorm in float32, in the dtype that it was given."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps) * scale[None]
    return wide.astype(x.dtype)


def step_backend_of(qkv, x, cached: Cached, weights: Weights, asked: str | None = None) -> str:
    """What runs a whole layer of these on the device at hand.

    Raises:
        ValueError: for a backend that there is not.
    """
    if _named(asked):
        return str(asked)
    return "mosaic" if dispatch.hopper() and not step_refusal(qkv, x, cached, weights) else "xla"


def backend_of(attended, x, weights: Weights, asked: str | None = None) -> str:
    """What runs a layer's products of these on the device at hand.

    Raises:
        ValueError: for a backend that there is not.
    """
    if _named(asked):
        return str(asked)
    if x.shape[0] > MOST_ROWS or not dispatch.hopper():
        return "xla"
    if why := refusal(attended, x, weights):
        dispatch.warn("a layer's products are", why)
        return "xla"
    return "mosaic"


def refusal(attended, x, weights: Weights) -> str | None:
    """Why the kernel does not take these; None if it does."""
    arrays = (attended, x, weights.out, weights.gate_up, weights.down, weights.following)
    if other := sorted({str(y.dtype) for y in arrays} - {"bfloat16"}):
        return f"expected bfloat16 throughout, got {', '.join(other)}"
    if other := sorted({str(y.dtype) for y in (weights.mlp_norm, weights.following_norm)} - {"float32"}):
        return f"expected norms in float32, got {', '.join(other)}"
    rows = x.shape[0]
    if not 1 <= rows <= MOST_ROWS:
        return f"expected 1 to {MOST_ROWS} rows, got {rows}"
    for name, kernel in (("out", weights.out), ("down", weights.down), ("following", weights.following)):
        if kernel.shape[0] % 16 or kernel.shape[1] % 64:
            return f"expected `{name}` to have outputs that 16 divides and inputs that 64 divides, got {kernel.shape}"
    if depth(sizes(weights), rows) < 3:
        return f"{rows} rows of {max(sizes(weights))} leave no room in shared memory for weights"
    return None


def step_refusal(qkv, x, cached: Cached, weights: Weights) -> str | None:
    """Why the kernel does not take a whole layer; None if it does."""
    if why := attention_refusal(qkv, cached, dispatch.cores()):
        return why
    attended = jax.ShapeDtypeStruct((x.shape[0], weights.out.shape[1]), x.dtype)
    return refusal(attended, x, weights)


def _named(asked: str | None) -> bool:
    if asked not in (None, *BACKENDS):
        raise ValueError(f"layer_products: `backend` must be one of {', '.join(BACKENDS)} or None, got {asked!r}")
    return asked is not None


def sizes(weights: Weights) -> list[int]:
    """Inputs of the four products."""
    return [x.shape[1] for x in (weights.out, weights.gate_up, weights.down, weights.following)]


def chunk(inputs: int, most: int = 1024) -> int:
    """Inputs that are read at once: a multiple of 64 that divides all of them."""
    return next(size for size in range(most, 0, -64) if inputs % size == 0)


def depth(inputs: list[int], rows: int) -> int:
    """Stages of weights, 16 outputs each, that fit into shared memory beside the rows."""
    arrays = rows * 2 * (max(inputs) + 32), rows * 4 * 8 * 33
    kept = sum(-(-size // ALIGNED) for size in arrays) * ALIGNED + 2 * ALIGNED  # barriers, and where all begins
    return min((MEMORY - kept) // (2 * 16 * max(chunk(size) for size in inputs)), 8)


@cache
def _kernel(eps: float, anywhere: bool, interpret: Any):
    def kernel(*args):
        from kernels.layer_kernel import run

        if why := refusal(*args):
            raise ValueError(f"layer_products: {why}")
        return run(*args, eps=eps, interpret=interpret)

    def flat(function):
        return lambda attended, x, *leaves: function(attended, x, Weights(*leaves))

    operation = dispatch.served(flat(kernel), flat(partial(reference, eps=eps)), anywhere=anywhere)

    return lambda attended, x, weights: operation(attended, x, *jax.tree.leaves(weights))


@cache
def _step_kernel(mask: Mask, eps: float, anywhere: bool, interpret: Any):
    def kernel(*args):
        from kernels.layer_kernel import run_step

        if why := step_refusal(*args):
            raise ValueError(f"layer_step: {why}")
        return run_step(*args, mask, eps=eps, interpret=interpret)

    def written(*args):
        return reference_step(*args, mask, eps)

    def flat(function):
        return lambda qkv, x, *leaves: function(qkv, x, Cached(*leaves[:7]), Weights(*leaves[7:]))

    operation = dispatch.served(flat(kernel), flat(written), anywhere=anywhere)
    return lambda qkv, x, cached, weights: operation(qkv, x, *jax.tree.leaves(cached), *jax.tree.leaves(weights))


def _product(x, kernel):
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))
