"""From a Hugging Face `config.json` to a `ModelConfig`, one builder a family.

A key that a file leaves out has the value that `transformers` gives it. Source: `configuration_*.py` and
`modeling_rope_utils.py` of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kvjax.config import Activation, ModelConfig, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
Raw = dict[str, Any]


def build_config(raw: Raw, builder: Callable[[Raw], ModelConfig]) -> ModelConfig:
    """Check the sizes that every configuration must have, then let the family's builder read the rest.

    Raises:
        ValueError: naming all sizes that are missing or not positive, or a setting that is not supported.
    """
    plain = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head") if builder is gpt2 else plain
    if bad := [name for name in sizes if not isinstance(raw.get(name), int) or raw[name] < 1]:
        raise ValueError(f"missing, or not a positive integer: {', '.join(bad)}")
    if raw.get("quantization_config"):
        raise ValueError(
            "`quantization_config` is set: only unquantised safetensors are read (a GGUF may be quantised)"
        )
    try:
        return builder(raw)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a setting has a wrong type ({error!r})") from error


def llama(raw: Raw) -> ModelConfig:
    """Llama 2 and 3, SmolLM2."""
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        windows=(None,) * raw["num_hidden_layers"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        **_shared(raw, positions=2048),
    )


def mistral(raw: Raw) -> ModelConfig:
    """Mistral: Llama with a sliding window on every layer, or on none."""
    return ModelConfig(
        family="mistral",
        windows=(_window(raw.get("sliding_window", 4096)),) * raw["num_hidden_layers"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        **_shared(raw, positions=131_072),
    )


def qwen2(raw: Raw) -> ModelConfig:
    """Qwen2 and 2.5: bias on q, k and v; the layers from `max_window_layers` on may have a window."""
    return ModelConfig(
        family="qwen2",
        windows=_qwen_windows(raw),
        qkv_bias=True,
        tied=bool(raw.get("tie_word_embeddings", False)),
        **_shared(raw, positions=32_768),
    )


def qwen3(raw: Raw) -> ModelConfig:
    """Qwen3: each head's q and k are normed."""
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family="qwen3",
        windows=_qwen_windows(raw),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        tied=bool(raw.get("tie_word_embeddings", False)),
        **_shared({"head_dim": 128} | raw, positions=32_768),
    )


def gemma2(raw: Raw) -> ModelConfig:
    """Gemma 2: soft caps, a window on every other layer, norms after each half, scaled embedding."""
    if raw.get("use_bidirectional_attention"):
        raise ValueError("`use_bidirectional_attention` is set, and only causal models are supported")
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    bias = bool(raw.get("attention_bias", False))
    # the first files of the family carry a wrong `hidden_act`
    raw = {"head_dim": 256} | raw | {"hidden_act": raw.get("hidden_activation") or "gelu_pytorch_tanh"}
    return ModelConfig(
        family="gemma2",
        windows=_windows(kinds, raw.get("sliding_window", 4096), layers),
        qkv_bias=bias,
        out_bias=bias,
        post_norms=True,
        tied=bool(raw.get("tie_word_embeddings", True)),
        embed_scale=math.sqrt(raw["hidden_size"]),
        query_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_float_or_none(raw.get("attn_logit_softcapping", 50.0)),
        logit_softcap=_float_or_none(raw.get("final_logit_softcapping", 30.0)),
        **_shared(raw, positions=8192),
    )


def gpt2(raw: Raw) -> ModelConfig:
    """GPT-2: learned positions, LayerNorm, biases, a plain MLP."""
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if raw.get(key):
            raise ValueError(f"`{key}` is set, which is not supported")
    hidden, heads = raw["n_embd"], raw["n_head"]
    return ModelConfig(
        family="gpt2",
        vocab=raw["vocab_size"],
        hidden=hidden,
        intermediate=raw.get("n_inner") or 4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=raw.get("n_positions", 1024),
        windows=(None,) * raw["n_layer"],
        rope=None,
        norm="layer",
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        activation=_activation(raw.get("activation_function", "gelu_new")),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(raw.get("tie_word_embeddings", True)),
        query_scale=None if raw.get("scale_attn_weights", True) else 1.0,
    )


def _shared(raw: Raw, *, positions: int) -> Raw:
    """The fields that every family but GPT-2 spells alike."""
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    raw = {"max_position_embeddings": positions} | raw
    return {
        "vocab": raw["vocab_size"],
        "hidden": raw["hidden_size"],
        "intermediate": raw["intermediate_size"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_positions": raw["max_position_embeddings"],
        "rope": _rope(raw),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "activation": _activation(raw.get("hidden_act", "silu")),
    }


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _qwen_windows(raw: Raw) -> tuple[int | None, ...]:
    layers, first = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    return _windows(kinds, window, layers)


def _windows(kinds: list[str], window: int | None, layers: int) -> tuple[int | None, ...]:
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"`layer_types` has {sorted(unknown)}; known are full_attention and sliding_attention")
    if len(kinds) != layers:
        raise ValueError(f"`layer_types` has {len(kinds)} entries for {layers} layers")
    return tuple(_window(window) if kind == "sliding_attention" else None for kind in kinds)


def _window(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"`sliding_window` must be a positive integer or null, got {value!r}")
    return value


def _rope(raw: Raw) -> Rope:
    """Both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` of transformers 5."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("rope settings that differ by layer type are not supported")
    if (raw.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("`partial_rotary_factor` other than 1 is not supported for this family")
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    positions = raw["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = original or positions
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope scaling {kind!r} is not supported; known are default, linear, llama3 and yarn")
    factor = scaling.get("factor") or (positions / original if kind == "yarn" else None)
    if factor is None:
        raise ValueError(f"rope scaling {kind!r} needs a `factor`")
    if kind == "linear":
        return Rope(theta, "linear", float(factor))
    if kind == "llama3":
        if lost := [key for key in ("low_freq_factor", "high_freq_factor") if key not in scaling]:
            raise ValueError(f"rope scaling 'llama3' needs {' and '.join(lost)}")
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return Rope(theta, "llama3", float(factor), original, low, high)
    return Rope(
        theta,
        "yarn",
        float(factor),
        original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=_yarn_attention_factor(scaling, factor),
        truncate=bool(scaling.get("truncate", True)),
    )


def _yarn_attention_factor(scaling: Raw, factor: float) -> float:
    """What cos and sin are multiplied by (arXiv:2309.00071, section 3.4)."""

    def grow(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grow(scaling["mscale"]) / grow(scaling["mscale_all_dim"])
    return grow()
