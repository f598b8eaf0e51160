"""One layer of a transformer: norms, products, attention."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask, attend, by_head
from kvjax.cache.base import Attends
from kvjax.compact import Compact
from kvjax.config import Acceleration, ModelConfig, Precision
from kvjax.mesh import DATA, cut, laid
from kvjax.product import product
from kvjax.rope import rotate

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(nn.Module):
    """`x @ kernel.T + bias`, in the compute dtype; `whole` as `product` has it."""

    features: int
    bias: bool
    precision: Precision
    whole: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch width inputs"]) -> Float[Array, "batch width outputs"]:
        dtype = jnp.dtype(self.precision.compute)
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.precision.params)
        y = product(x.astype(dtype), kernel.astype(dtype), whole=self.whole)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.precision.params)
        return y + bias.astype(dtype)[None, None]


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm, over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.float32)
        ones = (1,) * (x.ndim - 1)
        if self.config.norm == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.config.norm_eps)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        wide = wide * scale.reshape(*ones, -1)
        if self.config.norm == "layer":
            wide = wide + self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32).reshape(*ones, -1)
        return wide.astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP with their residuals; the layer's cache answers the attention.

    With `places`, `x` has those tokens only, in one row, and attention is given rows again.
    """

    config: ModelConfig
    precision: Precision
    window: int | None
    accelerate: Acceleration = Acceleration()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows tokens hidden"],
        positions: Int[Array, "batch width"],
        valid: Bool[Array, "batch width"],
        layer: Attends | None,
        places: Compact | None = None,
    ) -> tuple[Float[Array, "rows tokens hidden"], Attends | None]:
        c, mesh = self.config, self.accelerate.mesh
        out, layer = self._attention(Norm(c, name="attention_norm")(x), positions, valid, layer, places)
        x = laid(x + (Norm(c, name="post_attention_norm")(out) if c.post_norms else out), mesh, DATA)
        out = self._mlp(Norm(c, name="mlp_norm")(x))
        return laid(x + (Norm(c, name="post_mlp_norm")(out) if c.post_norms else out), mesh, DATA), layer

    @property
    def mask(self) -> Mask:
        """What a query sees, and how."""
        c = self.config
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        return Mask(scale, self.window, softcap=c.attention_softcap, backend=self.accelerate.attention)

    def _attention(self, x, positions, valid, layer, places):
        c = self.config
        qkv = self._linear((c.heads + 2 * c.kv_heads) * c.head_dim, c.qkv_bias, "qkv")(x)
        norms = (Norm(c, name="q_norm"), Norm(c, name="k_norm")) if c.qk_norm else None
        out, layer = attended(self, qkv, positions, valid, layer, places, norms)
        return self._linear(c.hidden, c.out_bias, "out")(out), layer

    def _mlp(self, x):
        c = self.config
        act = _ACTIVATIONS[c.activation]
        if c.gated:
            gate_up = self._linear(2 * c.intermediate, c.mlp_bias, "gate_up")(x)
            gate, up = cut(gate_up, (c.intermediate,) * 2, self.accelerate.shards)
            inner = act(gate) * up
        else:
            inner = act(self._linear(c.intermediate, c.mlp_bias, "up")(x))
        return self._linear(c.hidden, c.mlp_bias, "down")(inner)

    def _linear(self, features: int, bias: bool, name: str) -> Linear:
        return Linear(features, bias, self.precision, self.accelerate.mesh is not None, name=name)


def attended(
    block: Block,
    qkv: Float[Array, "rows tokens outputs"],
    positions: Int[Array, "batch width"],
    valid: Bool[Array, "batch width"],
    layer: Attends | None,
    places: Compact | None,
    norms: tuple[Callable, Callable] | None,
) -> tuple[Float[Array, "rows tokens attended"], Attends | None]:
    """A block's attention, from its queries, keys and values, side by side, to what its output product takes.

    Args:
        norms: of queries and of keys, where the model has them.
    """
    c, (batch, width) = block.config, positions.shape
    q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if places is not None:
        qkv = places.spread(qkv)
    q, k, v = cut(qkv, (q_size, kv_size, kv_size), block.accelerate.shards)
    q = q.reshape(batch, width, c.heads, c.head_dim)
    k = k.reshape(batch, width, c.kv_heads, c.head_dim)
    v = v.reshape(batch, width, c.kv_heads, c.head_dim)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    if c.rope is not None:
        q, k = rotate(q, positions, c.rope), rotate(k, positions, c.rope)
    if layer is None:
        slots = jnp.where(valid, positions, -1)
        out, _ = attend(q, by_head(k), by_head(v), positions, slots, block.mask)
    else:
        out, _, layer = layer.attend(q, k, v, positions, valid, block.mask)
    out = out.reshape(batch, width, q_size)
    return out if places is None else places.gathered(out), layer
