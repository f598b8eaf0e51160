"""Both spellings of a `config.json`, and settings that are refused."""

import json

import pytest

from kvjax.config import Rope
from kvjax.weights import FAMILIES
from kvjax.weights.hf_config import build_config

CASES = ("llama2", "llama3_scaled", "llama_linear_bias", "llama_yarn", "qwen3_yarn", "gemma2")


def raw(golden, name, **changes):
    return json.loads((golden / "families" / name / "config.json").read_text()) | changes


def config(settings):
    return build_config(settings, FAMILIES[settings["model_type"]].config)


@pytest.mark.parametrize("name", CASES)
def test_the_old_spelling_of_rope_means_the_same(golden, name):
    new = raw(golden, name)
    old = raw(golden, name)
    scaling = old.pop("rope_parameters")
    old["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type", "default")
    old["rope_scaling"] = None if scaling["type"] == "default" else scaling
    assert config(old) == config(new)


def test_defaults_are_those_of_transformers(golden):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name, theta in (("llama2", 1e4), ("mistral", 1e4), ("gemma2", 1e4)):
        short = {key: value for key, value in raw(golden, name).items() if key in (*sizes, "model_type")}
        short |= {"head_dim": 8}
        built = config(short)
        assert built.rope == Rope(theta)
        assert built.windows[0] == {"llama2": None, "mistral": 4096, "gemma2": 4096}[name]
        assert built.tied == (name == "gemma2")


def test_qwen_windows_need_their_switch(golden):
    settings = raw(golden, "qwen2_windows", layer_types=None)
    assert config(settings).windows == (None, 5, 5)
    assert config(settings | {"use_sliding_window": False}).windows == (None, None, None)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supp"),
        ("llama2", {"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ("llama2", {"rope_parameters": {"rope_type": "linear"}}, "needs a `factor`"),
        ("llama2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor and high_freq_factor"),
        ("llama2", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer type"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"hidden_act": "relu"}, "activation 'relu' is not supported; known are silu"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama2", {"rms_norm_eps": "small"}, "could not convert"),
        ("llama2", {"rope_parameters": [1]}, "wrong type"),
        ("llama2", {"hidden_size": None, "vocab_size": "many"}, "not a positive integer: vocab_size, hidden_size"),
        ("llama2", {"num_key_value_heads": 3}, "must be a multiple of `kv_heads`"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        (
            "mistral_window",
            {"sliding_window": "wide"},
            "`sliding_window` must be a positive integer or null, got 'wide'",
        ),
        ("gemma2", {"sliding_window": 0}, "`sliding_window` must be"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_is_not_supported_is_said(golden, name, change, message):
    with pytest.raises(ValueError, match=message):
        config(raw(golden, name, **change))
