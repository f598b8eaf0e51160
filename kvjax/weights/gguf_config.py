"""From the metadata of a GGUF file to a `ModelConfig`.

Where the file is silent, llama.cpp's own choice is taken. Source: `llama-model.cpp` and `convert_hf_to_gguf.py`
of llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvjax.config import ModelConfig, Rope
from kvjax.rope import frequencies
from kvjax.weights.gguf_file import GGUF

_GEMMA2_27B_LAYERS = 46


def gguf_config(file: GGUF, family: str) -> ModelConfig:
    """The configuration of a GGUF model of one of the known architectures.

    Biases and a separate head are not in the metadata: the tensors that are there say so.

    Raises:
        ValueError: naming every required entry that is missing, or an entry that is not supported.
    """
    layers, hidden, intermediate, heads, positions = _required(
        file,
        family,
        ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"),
    )
    if "token_embd.weight" not in file.tensors:
        raise ValueError("the tensor token_embd.weight is missing")
    if _get(file, family, "expert_count", 0):
        raise ValueError("mixtures of experts are not supported")
    head_dim = _get(file, family, "attention.key_length", hidden // max(heads, 1))
    if _get(file, family, "attention.value_length", head_dim) != head_dim:
        raise ValueError("keys and values of different sizes are not supported")
    gpt2, gemma2 = family == "gpt2", family == "gemma2"
    eps = _get(file, family, "attention.layer_norm_epsilon" if gpt2 else "attention.layer_norm_rms_epsilon", 1e-5)
    return ModelConfig(
        family=family,
        vocab=file.tensors["token_embd.weight"].shape[0],
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=_get(file, family, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=positions,
        windows=_windows(file, family, layers),
        rope=None if gpt2 else _rope(file, family, head_dim),
        norm="layer" if gpt2 else "rms",
        norm_eps=round(eps, 12),  # 9.999999747378752e-06 is float32's 1e-5
        activation="gelu_tanh" if gpt2 or gemma2 else "silu",
        gated=not gpt2,
        qkv_bias="blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=family == "qwen3",
        post_norms=gemma2,
        tied="output.weight" not in file.tensors,
        embed_scale=math.sqrt(hidden) if gemma2 else 1.0,
        query_scale=(hidden / heads) ** -0.5 if gemma2 and layers == _GEMMA2_27B_LAYERS else None,
        attention_softcap=_get(file, family, "attn_logit_softcapping", 50.0) if gemma2 else None,
        logit_softcap=_get(file, family, "final_logit_softcapping", 30.0) if gemma2 else None,
    )


def _get(file: GGUF, family: str, name: str, default: Any) -> Any:
    """An entry of the architecture; a list with one value a layer must be the same in all."""
    value = file.metadata.get(f"{family}.{name}", default)
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise ValueError(f"`{family}.{name}` differs from layer to layer, which is not supported")
        value = value[0].item()
    if default is not None and not isinstance(value, (int, float, type(default))):
        raise ValueError(f"`{family}.{name}` must be a {type(default).__name__}, got {value!r}")
    return value


def _required(file: GGUF, family: str, names: tuple[str, ...]) -> list[int]:
    values = [_get(file, family, name, None) for name in names]
    if bad := [f"{family}.{name}" for name, v in zip(names, values, strict=True) if not isinstance(v, int) or v < 1]:
        raise ValueError(f"the metadata has no (valid) {', '.join(bad)}")
    return values


def _windows(file: GGUF, family: str, layers: int) -> tuple[int | None, ...]:
    """Gemma 2: the even layers. Llama (Mistral is stored as one): every layer, if the file has a window."""
    if family not in ("gemma2", "llama"):
        return (None,) * layers
    window = _get(file, family, "attention.sliding_window", 4096 if family == "gemma2" else 0) or None
    every = 2 if family == "gemma2" else 1
    return tuple(None if i % every else window for i in range(layers))


def _rope(file: GGUF, family: str, head_dim: int) -> Rope:
    theta = float(_get(file, family, "rope.freq_base", 10_000.0))
    rotated = _get(file, family, "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"rope on {rotated} of {head_dim} dimensions is not supported for this family")
    kind = _get(file, family, "rope.scaling.type", "none")
    factor = float(_get(file, family, "rope.scaling.factor", 0.0))
    original = int(_get(file, family, "rope.scaling.original_context_length", 0))
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file.tensors["rope_freqs.weight"].read(), theta, head_dim, original or 8192)
    if kind == "none" or not factor:
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind != "yarn":
        raise ValueError(f"rope scaling {kind!r} is not supported; known are none, linear and yarn")
    grow = _get(file, family, "rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))
    return Rope(
        theta,
        "yarn",
        factor,
        original or _get(file, family, "context_length", 0),
        beta_fast=float(_get(file, family, "rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(_get(file, family, "rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=grow,
    )


def _llama3(divisors: np.ndarray, theta: float, head_dim: int, original: int) -> Rope:
    """A GGUF stores llama3's rule as what each pair's frequency is divided by; find the rule again."""
    rope = Rope(theta, "llama3", float(divisors.max()), original, 1.0, 4.0)
    plain, _ = frequencies(Rope(theta), head_dim)
    again, _ = frequencies(rope, head_dim)
    if divisors.shape != plain.shape or not np.allclose(plain / again, divisors, rtol=1e-4):
        raise ValueError("rope_freqs.weight holds other factors than Llama 3's rule gives; this is not supported")
    return rope
