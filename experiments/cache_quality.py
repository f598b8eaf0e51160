"""What each cache costs and what it loses: bytes a token against agreement, perplexity and retrieval.

Ordinary text is taken in as one prompt; of what follows, `step` tokens at a time, each next-token distribution is
compared with the full cache's. Pass-keys count over the prompts that the full cache solves, with the question not
yet seen when the context is compressed (`retrieval`), and seen (`retrieval_seen`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import kvjax
from experiments.passkey import PassKey, pass_key, text
from experiments.quality_programs import Programs
from experiments.registry import Progress, Row
from experiments.run import results_folder, spell
from kvjax.cache import Dense, Quantized, Strategy, bit_problem
from kvjax.cache.allocation import exact
from kvjax.cache.sensitivity import with_bits
from kvjax.terminal.session import parse_strategy

SAMPLES = 4
"""Excerpts that sensitivity is measured on."""


@dataclass(frozen=True)
class Config:
    """The fields of `cache_quality.yaml`.

    Args:
        model: "smollm2", or whatever `kvjax.load` takes.
        strategies: as `--cache` takes them: `evicting:budget=0.5,score=snapkv`.
        allocated: bits a layer, for keys and values apart, as `allocate_bits` chooses them for each of these shares
            of a full bfloat16 cache; measured on text that is not scored.
        texts: excerpts of ordinary text; 0 leaves them out.
        context: tokens of each that are taken in at once.
        scored: tokens after those that are compared.
        step: how many of these go into the cache at a time.
        prompts: pass-key prompts; 0 leaves them out.
        lengths: their contexts, in tokens, by turns.
        batch: sequences at a time.
        plot: a PNG to draw; a name alone is put next to the results, "" draws none.
    """

    model: str = "smollm2"
    strategies: tuple[str, ...] = ()
    allocated: tuple[float, ...] = ()
    texts: int = 8
    context: int = 512
    scored: int = 256
    step: int = 32
    prompts: int = 200
    lengths: tuple[int, ...] = (256, 384, 512, 640)
    batch: int = 16
    plot: str = ""

    def __post_init__(self):
        for name, least in (("texts", 0), ("prompts", 0), ("context", 1), ("scored", 1), ("step", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"cache_quality: `{name}` must be at least {least}, got {getattr(self, name)}")
        if self.scored % self.step:
            raise ValueError(f"cache_quality: `step` must divide `scored`, {self.scored}, got {self.step}")
        if not self.lengths:
            raise ValueError("cache_quality: `lengths` must name at least one context, got none")
        if not all(0 < share <= 1 for share in self.allocated):
            raise ValueError(f"cache_quality: `allocated` must be shares in (0, 1], got {self.allocated}")
        for name in self.strategies:
            parse_strategy(name)


def run(config: Config, progress: Progress) -> list[Row]:
    """A row for each strategy, the model's own full cache first; each is also shown as it comes."""
    if config.plot and find_spec("matplotlib") is None:
        raise ValueError("cache_quality: `plot` needs matplotlib: pip install matplotlib, or leave `plot` empty")
    model, params, tokenizer = kvjax.load(config.model)
    filler = text(tokenizer)
    texts = excerpts(config, filler)
    prompts = pass_keys(config, tokenizer, filler)
    strategies: dict[str, Strategy] = {"dense": Dense()} | {name: parse_strategy(name) for name in config.strategies}
    full = 2 * 2 * model.config.layers * model.config.kv_heads * model.config.head_dim  # bfloat16
    strategies |= allocations(config, model, params, filler, full, progress)
    programs = Programs(model, params, list(strategies.values()), texts, prompts, config)
    rows: list[Row] = []
    solved: dict[bool, np.ndarray] = {}
    for i, (name, strategy) in enumerate(strategies.items()):
        progress(name, i / len(strategies))
        capacity = config.context + config.scored
        each = kvjax.nbytes(strategy.shapes(model, batch=1, capacity=capacity)) / capacity
        row: Row = {"strategy": name, "bytes_per_token": each, "bytes_share": each / full}
        if config.texts:
            row |= programs.agreement(strategy)
        for seen, column in ((False, "retrieval"), (True, "retrieval_seen")) if config.prompts else ():
            hits = programs.retrieved(strategy, seen)
            mine = solved.setdefault(seen, hits)
            row |= {column: float(hits[mine].mean()) if mine.any() else None, "of": int(mine.sum())}
        rows.append(row)
        print("  ".join(f"{key} {spell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
    if config.plot:
        from experiments.quality_plot import draw

        target = Path(config.plot)
        draw(rows, target if target.parent.name else results_folder() / target)
    return rows


def allocations(config: Config, model, params, filler: list[int], full: int, progress: Progress) -> dict[str, Strategy]:
    """A strategy for each of the config's shares; `full` is what a token takes in a full cache, in bytes."""
    if not config.allocated:
        return {}
    capacity, base = config.context + config.scored, Quantized(dtype="bfloat16")
    between = excerpts(replace(config, texts=2 * SAMPLES + 1), filler)[1::2]
    most = kvjax.nbytes(replace(base, bits=8).shapes(model, batch=1, capacity=capacity))
    problem = bit_problem(
        model, params, between, most, capacity=capacity, strategy=base, progress=lambda done: progress("bits", done)
    )
    found: dict[str, Strategy] = {}
    for share in config.allocated:
        within = replace(problem, budget=problem.budget - most + int(share * full * capacity))
        name, strategy = f"bits by layer within {share:.0%}", with_bits(base, problem, exact(within))
        print(f"{name}: {strategy}", file=sys.stderr, flush=True)
        found[name] = strategy
    return found


def excerpts(config: Config, filler: list[int]) -> np.ndarray:
    """Ordinary text, `[texts, context + scored + 1]`, spread over all there is."""
    width = config.context + config.scored + 1
    starts = np.linspace(0, len(filler) - width, config.texts).astype(int)
    return np.array([filler[start : start + width] for start in starts], np.int32).reshape(-1, width)


def pass_keys(config: Config, tokenizer, filler: list[int]) -> list[PassKey]:
    """Prompts of every length by turns, the key's depth spread evenly within each length."""
    kinds = len(config.lengths)
    each = -(-config.prompts // kinds)
    return [
        pass_key(tokenizer, filler, config.lengths[i % kinds], (i // kinds + 0.5) / each, seed=i)
        for i in range(config.prompts)
    ]
