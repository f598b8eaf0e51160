"""Small random models of every family, large enough in their weights that logits tell tokens apart."""

from dataclasses import replace
from functools import cache

import jax

from kvjax import ModelConfig, Precision, Rope, Transformer, init_params

LLAMA = ModelConfig(
    family="llama",
    vocab=61,
    hidden=32,
    intermediate=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=512,
    windows=(None, None),
)

FAMILIES = {
    "llama": LLAMA,
    "llama3-rope": replace(
        LLAMA, rope=Rope(theta=1e4, scaling="llama3", factor=8.0, original_positions=16, high_freq_factor=4.0)
    ),
    "mistral": replace(LLAMA, family="mistral", windows=(7, 7), tied=False),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, kv_heads=1),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, kv_heads=4),
    "gemma2": replace(
        LLAMA,
        family="gemma2",
        windows=(6, None),
        activation="gelu_tanh",
        post_norms=True,
        embed_scale=5.5,
        query_scale=0.3,
        attention_softcap=8.0,
        logit_softcap=12.0,
    ),
    "gpt2": replace(
        LLAMA,
        family="gpt2",
        rope=None,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        kv_heads=4,
        max_positions=96,
    ),
}


FLOAT32 = Precision()


@cache
def tiny(family: str = "llama", precision: Precision = FLOAT32):
    """A model and its parameters."""
    model = Transformer(FAMILIES[family], precision)
    params = init_params(model, jax.random.key(7))
    return model, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)


def prompts(seed: int, batch: int, width: int, vocab: int = 61):
    """Random token ids."""
    return jax.random.randint(jax.random.key(seed), (batch, width), 0, vocab)
