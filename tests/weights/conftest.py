"""What the tests of `kvjax.weights` share: golden folders, and GGUF files written from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parents[1] / "golden"

_HF_TO_GGUF = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm", "wte": "token_embd",
    "wpe": "position_embd", "ln_f": "output_norm",
}  # fmt: skip
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The converter of llama.cpp, word for word (`LlamaModel.permute` of convert_hf_to_gguf.py)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str, family: str) -> str:
    name = name.removeprefix("model.").removeprefix("transformer.")
    stem, end = name.rsplit(".", 1)
    if not stem.startswith(("layers.", "h.")):
        return f"{_HF_TO_GGUF[stem]}.{end}"
    _, layer, rest = stem.split(".", 2)
    table = _LAYER | (_GEMMA if family == "gemma2" else {})
    return f"blk.{layer}.{table[rest]}.{end}"


@pytest.fixture
def write_gguf(tmp_path):
    """Write a golden Hugging Face folder as llama.cpp's converter would; returns the file."""

    def write(folder: Path, quantise=None, keys=None, tensors=None) -> Path:
        raw = json.loads((folder / "config.json").read_text())
        family = raw["model_type"]
        arch = "llama" if family == "mistral" else family
        hidden = raw.get("hidden_size") or raw["n_embd"]
        heads = raw.get("num_attention_heads") or raw["n_head"]
        kv_heads = raw.get("num_key_value_heads") or heads
        path = tmp_path / f"{folder.name}.gguf"
        out = gguf.GGUFWriter(path, arch)
        out.add_block_count(raw.get("num_hidden_layers") or raw["n_layer"])
        out.add_context_length(raw.get("max_position_embeddings") or raw["n_positions"])
        out.add_embedding_length(hidden)
        out.add_feed_forward_length(raw.get("intermediate_size") or 4 * hidden)
        out.add_head_count(heads)
        out.add_head_count_kv(kv_heads)
        if family == "gpt2":
            out.add_layer_norm_eps(raw["layer_norm_epsilon"])
        else:
            out.add_layer_norm_rms_eps(raw["rms_norm_eps"])
            out.add_key_length(raw.get("head_dim") or hidden // heads)
            out.add_value_length(raw.get("head_dim") or hidden // heads)
            out.add_rope_freq_base(raw["rope_parameters"]["rope_theta"])
        if raw.get("sliding_window") and family in ("gemma2", "mistral"):
            out.add_sliding_window(raw["sliding_window"])
        if family == "gemma2":
            out.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
            out.add_final_logit_softcapping(raw["final_logit_softcapping"])
        for add in keys or ():
            add(out)
        for name, weight in load_file(folder / "model.safetensors").items():
            weight = weight.astype(np.float32)
            target = _gguf_name(name, family)
            if arch == "llama" and ("attn_q." in target or "attn_k." in target):
                weight = _permuted(weight, heads if "attn_q." in target else kv_heads)
            if family == "gemma2" and "norm" in target:
                weight = weight + 1
            if family == "gpt2" and target.endswith("weight") and target.startswith("blk") and weight.ndim == 2:
                weight = np.ascontiguousarray(weight.T)
            kind = quantise if quantise is not None and weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            out.add_tensor(target, gguf.quantize(weight, kind), raw_dtype=kind)
        for name, value in (tensors or {}).items():
            out.add_tensor(name, value)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path

    return write


@pytest.fixture
def llama3_divisors():
    """`rope_freqs.weight` as llama.cpp's converter computes it."""

    def divisors(theta: float, dim: int, factor: float, original: int) -> np.ndarray:
        out = []
        for freq in 1.0 / theta ** (np.arange(0, dim, 2) / dim):
            wavelength = 2 * math.pi / freq
            if wavelength < original / 4.0:
                out.append(1.0)
            elif wavelength > original / 1.0:
                out.append(factor)
            else:
                smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
                out.append(1 / ((1 - smooth) / factor + smooth))
        return np.array(out, np.float32)

    return divisors
