"""Tokens a second of each way to decode, beside `generate` on the same prompts, in turns.

Prompts are taken in beforehand and not timed. Every way must give `generate`'s tokens: rows that differ, as
rounding at a near-tie makes them, are counted in `differing`.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import median

import jax
import numpy as np

import kvjax
from experiments.decode_batches import Batches, sample_rows, trace_rows
from experiments.registry import Progress, Row
from experiments.run import spell
from experiments.text import help_pages
from kvjax.cache import Cache, Dense
from kvjax.draft import Draft, PromptLookup

PLAIN = "generate"
METHODS: dict[str, Draft] = {
    "prompt lookup": PromptLookup(),
}
"""Ways to decode beside `generate`, by their drafts."""

CODE = ("textwrap:indent", "shlex:quote", "statistics:median", "fnmatch:filter", "colorsys:rgb_to_hls", "glob:glob")
CODE += ("textwrap:shorten", "string:capwords")
"""Functions of Python's own library."""

TOPICS = ("a lighthouse keeper", "two rival bakers", "a lost satellite", "a village without clocks")
TOPICS += ("the last library", "a shy dragon", "a night train", "a garden on the moon")

ASKS: dict[str, tuple[str, Callable[[int], str]]] = {
    "edit": ("Correct the spelling of this text and write all of it out again:\n\n{}", lambda i: _misspelt(_page(i))),
    "quote": ("Quote the three most important sentences of this text, word by word:\n\n{}", lambda i: _page(i)),
    "repair": ("Add a docstring to this function and write out all of it:\n\n```python\n{}\n```", lambda i: _code(i)),
    "open": ("Write a story about {}.", lambda i: TOPICS[i % len(TOPICS)]),
}
"""What is asked of the model, and of which text."""


MANY = "trace", "samples"
"""Works of many rows: see `Batches`."""


@dataclass(frozen=True)
class Config(Batches):
    """The fields of `decode.yaml`, with those of `Batches`.

    Args:
        model: as `kvjax.load` takes it.
        methods: names of `METHODS`; `generate` is always measured.
        works: names of `ASKS`, and of `MANY`.
        batches: rows at a time.
        prompts: of each work.
        new: tokens a row, at most.
        turns: of each way, after one that warms up.
    """

    model: str = "smollm2"
    methods: tuple[str, ...] = tuple(METHODS)
    works: tuple[str, ...] = (*ASKS, *MANY)
    batches: tuple[int, ...] = (1, 8)
    prompts: int = 8
    new: int = 128
    turns: int = 3

    def __post_init__(self):
        counts = "prompts", "new", "turns", "requests", "trace_turns", "divide", "rows", "slots", "samples", "prompt"
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"decode: `{name}` must be at least 1, got {getattr(self, name)}")
        for name, known in (("methods", METHODS), ("works", (*ASKS, *MANY))):
            if unknown := [x for x in getattr(self, name) if x not in known]:
                raise ValueError(f"decode: `{name}` must be among {', '.join(known)}, got {unknown}")
        for batch in self.batches:
            if batch < 1 or self.prompts % batch:
                raise ValueError(
                    f"decode: `batches` must be numbers that divide `prompts`, {self.prompts}, got {list(self.batches)}"
                )


@dataclass
class Timing:
    """What one turn of one way over a work's prompts gave."""

    seconds: float = 0.0
    made: int = 0
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0


def run(config: Config, progress: Progress) -> list[Row]:
    """Every way on every work, by turns."""
    model, params, tokenizer = kvjax.load(config.model)
    if tokenizer is None:
        raise ValueError(f"decode: {config.model} has no tokenizer, and the prompts are text")
    sampling = kvjax.Sampling(stop=tokenizer.stop_ids)
    rows: list[Row] = []
    works = [(work, batch) for work in config.works if work in ASKS for batch in config.batches]
    for number, (work, batch) in enumerate(works):
        prompts = [ask(tokenizer, work, i) for i in range(config.prompts)]
        drafts = {name: METHODS[name] for name in config.methods}
        timings, differing, costs = compare(
            model,
            params,
            prompts,
            batch,
            drafts,
            config.new,
            config.turns,
            sampling,
            lambda done, work=work, batch=batch, n=number: progress(f"{work}, batch {batch}", (n + done) / len(works)),
        )
        for name in timings:
            rows.append(row(name, work, batch, timings, differing[name], costs[name]))
            _say(rows[-1:])
    if "trace" in config.works:
        rows += _say(trace_rows(model, params, tokenizer, config, progress))
    if "samples" in config.works:
        rows += _say(sample_rows(model, params, tokenizer, config, config.new, config.turns, progress))
    return rows


def _say(rows: list[Row]) -> list[Row]:
    """What is measured so far, for whoever watches."""
    for row in rows:
        print("  ".join(f"{key} {spell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
    return rows


def compare(model, params, prompts, batch: int, drafts: Mapping[str, Draft], new: int, turns: int, sampling, done):
    """`generate` and each draft on the same prompts, in turns, of which the first warms up and is not counted.

    Returns:
        By name: each turn's `Timing`, rows that differed from `generate`'s in the last, and the measured costs.
    """
    capacity = -(-(max(map(len, prompts)) + new) // 64) * 64
    timings: dict[str, list[Timing]] = {name: [] for name in (PLAIN, *drafts)}
    costs: dict[str, np.ndarray | None] = dict.fromkeys(timings)
    differing = dict.fromkeys(timings, 0)
    for turn in range(turns + 1):
        now = {name: Timing() for name in timings}
        differing = dict.fromkeys(timings, 0)
        done(turn / (turns + 1))
        for first in range(0, len(prompts), batch):
            part, wanted = prompts[first : first + batch], None
            for name, timing in now.items():
                paid = None if (known := costs[name]) is None else known.tolist()
                cache = Dense().init(model, batch=batch, capacity=capacity)
                _, cache = kvjax.prefill(model, params, cache, [prompt[:-1] for prompt in part])
                jax.block_until_ready(cache)
                out, taken = _timed(model, params, cache, part, drafts.get(name), new, sampling, paid)
                timing.seconds += taken
                timing.made += int(out.lengths.sum())
                if out.speculated is not None:
                    costs[name] = np.asarray(out.speculated.costs)
                    timing.rounds += int(out.speculated.rounds.sum())
                    timing.proposed += int(out.speculated.proposed.sum())
                    timing.accepted += int(out.speculated.accepted.sum())
                wanted = out.tokens if wanted is None else wanted
                differing[name] += int((np.asarray(out.tokens) != np.asarray(wanted)).any(1).sum())
        for name, timing in now.items():
            if turn:
                timings[name].append(timing)
    return timings, differing, costs


def row(name: str, work: str, batch: int, timings, differing: int, costs) -> Row:
    """`accepted` is guesses that were right a call of the model and row, `right` their share of those checked."""
    speeds = [t.made / t.seconds for t in timings[name]]
    pairs = zip(timings[name], timings[PLAIN], strict=True)
    last = timings[name][-1]
    made: Row = {
        "method": name,
        "work": work,
        "batch": batch,
        "tokens_per_s": median(speeds),
        "range": [min(speeds), max(speeds)],
        "speedup": median((a.made / a.seconds) / (b.made / b.seconds) for a, b in pairs),
        "accepted": last.accepted / max(last.rounds * batch, 1),
        "differing": differing,
    }
    if costs is not None:
        made["right"] = last.accepted / max(last.proposed, 1)
        made["costs"] = [float(x) for x in costs / costs[0]]
    return made


def _timed(model, params, cache: Cache, prompts, draft, new: int, sampling, costs):
    started = time.perf_counter()
    last = [prompt[-1:] for prompt in prompts]
    if draft is None:
        out = kvjax.generate(model, params, cache, last, max_new=new, sampling=sampling)
    else:
        before = [prompt[:-1] for prompt in prompts]
        speculate = partial(kvjax.speculate, draft=draft, before=before, costs=costs)
        out = speculate(model, params, cache, last, max_new=new, sampling=sampling)
    jax.block_until_ready(out.tokens)
    return out, time.perf_counter() - started


def ask(tokenizer, work: str, i: int) -> list[int]:
    """The `i`-th prompt of a work."""
    words, about = ASKS[work]
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": words.format(about(i))}]))


def _page(i: int) -> str:
    """A paragraph of Python's help pages."""
    paragraphs = [" ".join(part.split()) for part in help_pages().split("\n\n")]
    prose = [part for part in paragraphs if 400 < len(part) < 600 and part[0].isupper() and "**" not in part]
    return prose[i * 7 % len(prose)]


def _misspelt(text: str) -> str:
    """Every ninth word of more than four letters loses its third."""
    words = text.split(" ")
    return " ".join(w[:2] + w[3:] if n % 9 == 4 and len(w) > 4 and w.isalpha() else w for n, w in enumerate(words))


def _code(i: int) -> str:
    module, name = CODE[i % len(CODE)].split(":")
    return textwrap.dedent(inspect.getsource(getattr(import_module(module), name)))
