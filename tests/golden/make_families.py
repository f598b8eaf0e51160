"""Make the golden checkpoints: a tiny random model of each family, and the logits `transformers` gives for it.

Run it in an environment with torch (CPU) and transformers; it needs no network:

    python tests/golden/make_families.py

For each case it writes `tests/golden/families/CASE/config.json`, `model.safetensors` (float32 values that float16
holds exactly, stored as float16), and `golden.safetensors` with `tokens`, `lengths` and float32 `logits`
(zero at padding).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

OUT = Path(__file__).parent / "families"
VOCAB, HIDDEN, WIDTH, LENGTHS = 96, 32, 20, (20, 13, 1)

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "llama2": ("llama", BASE | {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1e4}}),
    "llama3_scaled": ("llama", BASE | {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_linear_bias": (
        "llama",
        BASE
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    ),
    "llama_yarn": ("llama", BASE | {"rope_parameters": YARN, "head_dim": 16}),
    "smollm2": ("llama", BASE | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    "qwen2": ("qwen2", BASE | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2_windows": (
        "qwen2",
        BASE | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", BASE | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3_yarn": (
        "qwen3",
        BASE | {"head_dim": 16, "rope_parameters": YARN | {"beta_fast": 8.0, "truncate": False, "mscale": 0.7,
                                                           "mscale_all_dim": 0.4}},
    ),
    "mistral": ("mistral", BASE | {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral_window": ("mistral", BASE | {"sliding_window": 6, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        BASE
        | {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights large enough that attention is sharp and logits differ, rounded to float16."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or ".ln_" in name or "ln_f" in name:
            unit = 0.0 if "Gemma" in type(model).__name__ or name.endswith("bias") else 1.0
            value = unit + 0.3 * noise
        elif name.endswith("bias") or "wpe" in name:
            value = 0.5 * noise
        elif weight.shape == (VOCAB, HIDDEN):
            value = (0.4 if "Gemma" in type(model).__name__ else 1.0) * noise
        else:
            value = noise * 1.6 / HIDDEN**0.5
        weight.data = value.half().float()


def golden(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each row alone and without padding, so that nothing depends on how `transformers` masks."""
    tokens = torch.randint(3, VOCAB, (len(LENGTHS), WIDTH), generator=generator)
    logits = torch.zeros(len(LENGTHS), WIDTH, VOCAB)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            logits[row, :length] = model(tokens[row : row + 1, :length], use_cache=False).logits[0]
        tokens[row, length:] = 0
    return {"tokens": tokens.int(), "lengths": torch.tensor(LENGTHS, dtype=torch.int32), "logits": logits}


def make(case: str, family: str, settings: dict) -> None:
    """Write one case."""
    folder = OUT / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = transformers.AutoConfig.for_model(family, **settings)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(sorted(CASES).index(case))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, generator)
    model.tie_weights()
    save_file(golden(model, generator), folder / "golden.safetensors")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    raw = json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (family, settings) in CASES.items():
        make(name, family, settings)
        print(name)
