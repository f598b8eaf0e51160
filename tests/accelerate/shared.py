"""A tiny model that eight devices can share in several ways, and prompts for it."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np

import kvjax
from tests.tiny import LLAMA, prompts

BATCH = 4
LENGTHS = np.array([13, 5, 9, 3])
TOKENS = np.asarray(prompts(0, BATCH, 13, 61))


@cache
def model_of(tied: bool = False, layers: int = 1):
    """Eight query and four K/V heads; 64 tokens that devices can share."""
    config = replace(LLAMA, heads=8, kv_heads=4, intermediate=64, vocab=64, tied=tied, windows=(None,) * layers)
    model = kvjax.Transformer(config)
    params = kvjax.init_params(model, jax.random.key(7))
    return model, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
