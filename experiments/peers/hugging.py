"""`transformers`, float32, by a loop of forward calls: leaner than its own `generate`."""

from __future__ import annotations

import time
from pathlib import Path

import torch  # ty: ignore[import-not-found]  # an optional peer
from transformers import (  # ty: ignore[import-not-found]  # an optional peer
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)

from experiments.peers.work import Timing, Work


class Hugging:
    """One of the two caches, eager or through `torch.compile`, which sees the decoding step only."""

    def __init__(self, model: str, cache: str, compiled: bool):
        path = Path(model)
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        source = path.parent if where else path
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where).eval()
        self.cache = cache
        self.step = torch.compile(self.model.forward, dynamic=False) if compiled else self.model.forward
        self.settings = f"{cache} cache, sdpa" + (", torch.compile of the step" if compiled else "")

    @torch.inference_mode()
    def measure(self, work: Work) -> Timing:
        prompts = torch.tensor(work.prompts)
        config = self.model.config
        capacity = work.context + work.new + 1
        cache = StaticCache(config, max_cache_len=capacity) if self.cache == "static" else DynamicCache(config=config)
        begun = time.perf_counter()
        token = self._next(self.model.forward, prompts, cache)
        if not work.new:
            return Timing(time.perf_counter() - begun, [int(token[0])], self.settings)
        tokens, begun = [token], time.perf_counter()
        for _ in range(work.new):
            tokens.append(self._next(self.step, tokens[-1], cache))
        seconds = time.perf_counter() - begun
        return Timing(seconds, [int(token[0]) for token in tokens], self.settings)

    def _next(self, forward, tokens, cache):
        out = forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)


def make(model: str, threads: int, cache: str, compiled: bool = False) -> Hugging:
    """The engine."""
    torch.set_num_threads(threads)
    return Hugging(model, cache, compiled)
