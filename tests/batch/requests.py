"""Requests to the tiny model, and what each gets when it is alone."""

from dataclasses import replace

import jax
import numpy as np

import kvjax
from kvjax import Sampling
from kvjax.batch import Request
from kvjax.cache import Dense
from tests.tiny import tiny
from tests.tiny_model import bytes_tokenizer

KEY = jax.random.key(11)
CAPACITY, MAX_NEW = 40, 16


def several(seed: int, count: int, prefix: int = 0) -> list[Request]:
    """Requests of many lengths and settings; every second begins with the same `prefix` tokens."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 61, prefix).tolist()
    made = []
    for name in range(count):
        own = rng.integers(0, 61, rng.integers(1, 20 - prefix)).tolist()
        settings = (
            Sampling(),
            Sampling(temperature=1.0),
            Sampling(temperature=0.8, top_k=9, repetition=1.2, seed=77),
            Sampling(bias={4: 1.0}, banned=[5, 6], forced=[7, 8], stop=[9, 10, 11]),
            Sampling(presence=0.3, stop_strings=[chr(int(c)) for c in rng.integers(32, 60, 6)], limit=12),
        )[name % 5]
        tokens = common + own if name % 2 else own
        made.append(Request(name, tokens, int(rng.integers(1, MAX_NEW + 1)), settings))
    return made


def alone(request: Request, number: int, strategy=None, tokenizer=None) -> tuple[list[int], str]:
    """Tokens and reason of `generate` with the request by itself, as the `number`-th of its serve."""
    model, params = tiny()
    sampling = request.sampling
    if sampling.seed is None:
        sampling = replace(sampling, seed=number)
    cache = (strategy or Dense()).init(model, batch=1, capacity=CAPACITY)
    out = kvjax.generate(
        model,
        params,
        cache,
        [list(request.tokens)],
        max_new=request.max_new,
        key=KEY,
        sampling=sampling,
        tokenizer=tokenizer or bytes_tokenizer(),
    )
    return out.tokens[0, : int(out.lengths[0])].tolist(), kvjax.decode.REASONS[int(out.reason[0])]
