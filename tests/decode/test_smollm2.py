"""The real model, through the cache and the compiled loop, against the tokens of `transformers`.

The golden file is made by `tests/golden/make_smollm2.py`, in float32 from the same GGUF.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Ring

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())["rows"]


@pytest.mark.real
@pytest.mark.parametrize("strategy", [Dense(), Ring(window=200, sinks=4)], ids=str)
def test_greedy_tokens_agree_with_transformers(strategy, smollm2):
    """All prompts in one padded batch; 200 tokens of window hold each of them whole."""
    model, params, _ = smollm2
    cache = strategy.init(model, batch=len(GOLDEN), capacity=256)
    out = kvjax.generate(model, params, cache, [row["ids"] for row in GOLDEN], max_new=len(GOLDEN[0]["tokens"]))
    for row, made in zip(GOLDEN, np.asarray(out.tokens), strict=True):
        assert made.tolist() == row["tokens"], row["name"]
