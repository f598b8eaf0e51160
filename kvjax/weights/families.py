"""The families that are read: for each, its configuration and the names of its tensors.

A name table maps a place in the parameter tree (`{i}` is the layer) to the tensors that fill it, in order: the
fused kernels take several. Hugging Face names are written without the leading `model.` or `transformer.`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvjax.config import ModelConfig
from kvjax.weights import hf_config

Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """How one architecture is stored.

    Args:
        config: from a parsed `config.json` to a `ModelConfig`; raises `KeyError` for a size that is missing.
        hf: name table of a Hugging Face checkpoint.
        gguf: name table of a GGUF file.
        unit_norms: Hugging Face norms hold `w` for a scale of `1 + w` (a GGUF holds the scale itself).
        transposed: Hugging Face kernels are `[in, out]` (GPT-2's Conv1D).
        permuted: a GGUF's q and k rows are interleaved for llama.cpp's rope.
    """

    config: Callable[[dict[str, Any]], ModelConfig]
    hf: Names
    gguf: Names
    unit_norms: bool = False
    transposed: bool = False
    permuted: bool = False


def _layer(prefix: str, names: dict[str, str]) -> Names:
    return {f"layers.{place}": tuple(f"{prefix}.{n}" for n in name.split()) for place, name in names.items()}


_HF: Names = {
    "embed": ("embed_tokens.weight",),
    "norm.scale": ("norm.weight",),
    "head": ("lm_head.weight",),
} | _layer(
    "layers.{i}",
    {
        "attention_norm.scale": "input_layernorm.weight",
        "qkv.kernel": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "qkv.bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
        "q_norm.scale": "self_attn.q_norm.weight",
        "k_norm.scale": "self_attn.k_norm.weight",
        "out.kernel": "self_attn.o_proj.weight",
        "out.bias": "self_attn.o_proj.bias",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        "gate_up.kernel": "mlp.gate_proj.weight mlp.up_proj.weight",
        "gate_up.bias": "mlp.gate_proj.bias mlp.up_proj.bias",
        "down.kernel": "mlp.down_proj.weight",
        "down.bias": "mlp.down_proj.bias",
    },
)
_HF_GEMMA2 = _HF | _layer(
    "layers.{i}",
    {
        "post_attention_norm.scale": "post_attention_layernorm.weight",
        "mlp_norm.scale": "pre_feedforward_layernorm.weight",
        "post_mlp_norm.scale": "post_feedforward_layernorm.weight",
    },
)
_HF_GPT2: Names = {
    "embed": ("wte.weight",),
    "positions": ("wpe.weight",),
    "norm.scale": ("ln_f.weight",),
    "norm.bias": ("ln_f.bias",),
    "head": ("lm_head.weight",),
} | _layer(
    "h.{i}",
    {
        "attention_norm.scale": "ln_1.weight",
        "attention_norm.bias": "ln_1.bias",
        "qkv.kernel": "attn.c_attn.weight",
        "qkv.bias": "attn.c_attn.bias",
        "out.kernel": "attn.c_proj.weight",
        "out.bias": "attn.c_proj.bias",
        "mlp_norm.scale": "ln_2.weight",
        "mlp_norm.bias": "ln_2.bias",
        "up.kernel": "mlp.c_fc.weight",
        "up.bias": "mlp.c_fc.bias",
        "down.kernel": "mlp.c_proj.weight",
        "down.bias": "mlp.c_proj.bias",
    },
)
_GGUF: Names = {
    "embed": ("token_embd.weight",),
    "positions": ("position_embd.weight",),
    "norm.scale": ("output_norm.weight",),
    "norm.bias": ("output_norm.bias",),
    "head": ("output.weight",),
} | _layer(
    "blk.{i}",
    {
        "attention_norm.scale": "attn_norm.weight",
        "attention_norm.bias": "attn_norm.bias",
        "qkv.kernel": "attn_q.weight attn_k.weight attn_v.weight",
        "qkv.bias": "attn_q.bias attn_k.bias attn_v.bias",
        "q_norm.scale": "attn_q_norm.weight",
        "k_norm.scale": "attn_k_norm.weight",
        "out.kernel": "attn_output.weight",
        "out.bias": "attn_output.bias",
        "post_attention_norm.scale": "post_attention_norm.weight",
        "mlp_norm.scale": "ffn_norm.weight",
        "mlp_norm.bias": "ffn_norm.bias",
        "gate_up.kernel": "ffn_gate.weight ffn_up.weight",
        "gate_up.bias": "ffn_gate.bias ffn_up.bias",
        "up.kernel": "ffn_up.weight",
        "up.bias": "ffn_up.bias",
        "down.kernel": "ffn_down.weight",
        "down.bias": "ffn_down.bias",
        "post_mlp_norm.scale": "post_ffw_norm.weight",
    },
)
_GGUF_GPT2 = _GGUF | _layer("blk.{i}", {"qkv.kernel": "attn_qkv.weight", "qkv.bias": "attn_qkv.bias"})

FAMILIES = {
    "llama": Family(hf_config.llama, _HF, _GGUF, permuted=True),
    "mistral": Family(hf_config.mistral, _HF, _GGUF, permuted=True),
    "qwen2": Family(hf_config.qwen2, _HF, _GGUF),
    "qwen3": Family(hf_config.qwen3, _HF, _GGUF),
    "gemma2": Family(hf_config.gemma2, _HF_GEMMA2, _GGUF, unit_norms=True),
    "gpt2": Family(hf_config.gpt2, _HF_GPT2, _GGUF_GPT2, transposed=True),
}
"""By `model_type` of a `config.json`, which is also the GGUF's `general.architecture` (Mistral's is "llama")."""

UNUSED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rope_freqs.weight", "attn_rot_embd.weight")
"""Ends of the names of tensors that hold nothing to learn: a checkpoint may have them."""


def family_of(architecture: object) -> tuple[str, Family]:
    """The registry's row and its name, or a `ValueError` that lists what is known."""
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not known; known are {', '.join(FAMILIES)}")
    return architecture, FAMILIES[architecture]
