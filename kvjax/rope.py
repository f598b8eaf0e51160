"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with its scaling rules."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position for each rotated pair, and the factor on cos and sin.

    Computed once on the host in float64, so that it is a constant of the compiled program.
    """
    dim = rope.rotary_dim or head_dim
    base = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.scaling == "none":
        return base, 1.0
    if rope.scaling == "linear":
        return base / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, base), 1.0
    return _yarn(rope, base, dim), rope.attention_factor


def angles(
    positions: Int[Array, "batch width"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "batch width pairs"], Float[Array, "batch width pairs"]]:
    """Cosine and sine, times the rule's factor, of the angle by which each pair is rotated."""
    freqs, factor = frequencies(rope, head_dim)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)[None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "batch width heads head_dim"], positions: Int[Array, "batch width"], rope: Rope
) -> Float[Array, "batch width heads head_dim"]:
    """Rotate each pair `(x[i], x[i + dim/2])` by its position; the angle is taken in float32."""
    cos, sin = (part[:, :, None] for part in angles(positions, rope, x.shape[-1]))
    dim = 2 * cos.shape[-1]
    a = x[..., : dim // 2].astype(jnp.float32)
    b = x[..., dim // 2 : dim].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between are blended (Llama 3.1)."""
    wavelength = 2 * math.pi / base
    turns = rope.original_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn(rope: Rope, base: np.ndarray, dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv:2309.00071, eq. 19-23): a ramp over pairs by their number of turns."""

    def pair(turns: float) -> float:
        return dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return base / rope.factor * ramp + base * (1 - ramp)
