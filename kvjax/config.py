"""What a decoder-only transformer is made of, as one frozen, hashable value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.mesh import AXES, HEADS

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding and how its frequencies are stretched.

    `scaling` is one of `"none"`, `"linear"` (arXiv:2306.15595), `"llama3"` (Llama 3.1's
    piecewise rule) or `"yarn"` (arXiv:2309.00071). `factor` is the stretch; the other fields
    are read by the rules that need them. `rotary_dim` rotates only the first dimensions of a head.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    rotary_dim: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and choices of one model; families differ by nothing else.

    `windows` holds one entry a layer: a sliding window in tokens (a query sees that many tokens,
    itself included) or None for full attention. `rope` is None for learned positions.
    `query_scale` multiplies the attention logits; None means `head_dim ** -0.5`.
    """

    family: str
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    rope: Rope | None = Rope()
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self):
        sizes = ("vocab", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: `{name}` must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig: `heads` must be a multiple of `kv_heads` ({self.kv_heads}), got {self.heads}"
            )
        if not self.windows:
            raise ValueError("ModelConfig: `windows` needs one entry a layer, got none")

    @property
    def layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True)
class Precision:
    """Which dtype is used where, by name so that it stays hashable.

    `params` is what the weights are stored in, `compute` what matrix products run in, `cache`
    what keys and values are kept in, `logits` what comes out. Norms, softmax and `lse` are
    always float32.
    """

    params: str = "float32"
    compute: str = "float32"
    cache: str = "float32"
    logits: str = "float32"

    def __post_init__(self):
        for name in ("params", "compute", "cache", "logits"):
            try:
                known = jnp.issubdtype(jnp.dtype(getattr(self, name)), jnp.floating)
            except TypeError:
                known = False
            if not known:
                raise ValueError(
                    f"Precision: `{name}` must name a floating dtype such as 'float32' or 'bfloat16', "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Acceleration:
    """Which kernels a model's programs run, and on which devices.

    Args:
        attention: `"xla"`, or None: ours where device and shape suit them.
        layers: the same of whole layers of a step, or `"products"`: of all but their attention.
        mesh: the devices that share a model, as `kvjax.accelerate.shard` sets it; None for one device.
    """

    attention: str | None = None
    layers: str | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        for name, known in (("attention", ("xla",)), ("layers", ("products", "xla"))):
            if getattr(self, name) not in (None, *known):
                spelled = ", ".join(map(repr, known))
                raise ValueError(f"Acceleration: `{name}` must be {spelled} or None, got {getattr(self, name)!r}")
        if self.mesh is not None and self.mesh.axis_names != AXES:
            raise ValueError(
                f"Acceleration: `mesh` must have the axes {AXES}, as `kvjax.accelerate.Layout().mesh()` has them, "
                f"got {self.mesh.axis_names}"
            )

    @property
    def shards(self) -> int:
        """Devices that have different heads."""
        return 1 if self.mesh is None else self.mesh.shape[HEADS]

    @property
    def alone(self) -> Acceleration:
        """The same for what every device computes for itself, such as a draft whose parameters are whole on each."""
        return replace(self, mesh=None)


def differing(config: ModelConfig, other: ModelConfig | Mapping[str, Any]) -> str | None:
    """What another config, or one that was written as JSON, does not share, in words; None where they are the same."""
    pair = (config, other)
    ours, theirs = (json.loads(json.dumps(asdict(x) if isinstance(x, ModelConfig) else dict(x))) for x in pair)
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if not names:
        return None
    expected, got = ([x.get(name) for name in names] for x in (ours, theirs))
    return f"its {', '.join(names)} differ (expected {expected}, got {got})"
