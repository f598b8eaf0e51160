"""The two works of `decode` that are about many rows: a trace of requests, and many samples of one prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import numpy as np

import kvjax
from experiments.prefix_trace import find, read
from experiments.registry import Progress, Row
from experiments.text import help_pages
from kvjax.batch import Request, Settings, serve
from kvjax.batch import open as open_slots
from kvjax.cache import Dense, Paged
from kvjax.cache.prefix import POLICIES
from kvjax.decode.step import BUCKETS


@dataclass(frozen=True)
class Batches:
    """What `trace` and `samples` are made of.

    Args:
        trace: the file that requests are read from, as `prefix_trace` takes it.
        requests: of the trace, from its beginning.
        trace_turns: of each way to serve it, after one that warms up.
        divide: what all of its lengths are divided by.
        rows: of static batches; their bytes are what continuous batching gets too, as a pool of pages.
        slots: of continuous batching.
        samples: of one prompt.
        prompt: tokens of that prompt.
    """

    trace: str = "mooncake_conv_first_half.npz"
    requests: int = 32
    trace_turns: int = 1
    divide: int = 32
    rows: int = 16
    slots: int = 16
    samples: int = 16
    prompt: int = 1000

    @property
    def page(self) -> int:
        """Tokens that one of the trace's blocks, of 512, comes to."""
        return max(512 // self.divide, 1)


def requests_of(batches: Batches, tokenizer) -> list[Request]:
    """The trace's first requests with their lengths divided; a block stands for the same ordinary text each time."""
    text = np.array(tokenizer.encode(help_pages()), np.int32)
    size = batches.page
    made = []
    for name, access in enumerate(read(find(batches.trace))[: batches.requests]):
        assert access.answer is not None, "read with answers"
        blocks = [text[block * 7919 * size % (len(text) - size) :][:size] for block in access.path]
        prompt = np.concatenate(blocks)[: max(1, access.tokens // batches.divide)]
        made.append(Request(name, prompt.tolist(), max(1, access.answer // batches.divide), arrival=access.time))
    return made


def trace_rows(model, params, tokenizer, batches: Batches, progress: Progress) -> list[Row]:
    """Static batches, in the order of arrival, as large as the memory allows and of each smaller size, and slots.

    The memory is that of `rows` rows of a dense cache with room for the longest request. All requests are there from
    the start, so that what counts is the work.
    """
    requests = requests_of(batches, tokenizer)
    longest = max(len(r.tokens) + r.max_new for r in requests)
    capacity = -(-longest // 64) * 64
    bound = kvjax.nbytes(Dense().shapes(model, batch=batches.rows, capacity=capacity))
    page = batches.page
    one = kvjax.nbytes(Paged(page=page, pool=1).shapes(model, batch=1, capacity=page).layers)
    pool = bound // one
    made = sum(r.max_new for r in requests)
    sizes = [batches.rows]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // 4))
    seconds: dict[str, list[float]] = {}
    turns = batches.trace_turns
    notes: dict[str, dict[str, Any]] = {}
    for turn in range(turns + 1):
        for number, size in enumerate(sizes):
            progress(f"trace, static batches of {size}", (turn + number / (len(sizes) + 1)) / (turns + 1))
            taken = _static(model, params, requests, size, capacity, warm=turn == 0)
            seconds.setdefault(f"static batches of {size}", []).append(taken)
        progress("trace, slots", (turn + len(sizes) / (len(sizes) + 1)) / (turns + 1))
        taken, note = _slots(model, params, requests, batches, capacity, pool)
        seconds.setdefault("continuous batching", []).append(taken)
        notes["continuous batching"] = note | {"bytes": pool * one}
    base = f"static batches of {batches.rows}"
    rows: list[Row] = []
    for name, (_, *taken) in seconds.items():
        row: Row = {
            "method": name,
            "work": "trace",
            "batch": batches.slots if name == "continuous batching" else int(name.split()[-1]),
            "tokens_per_s": made / median(taken),
            "range": [made / max(taken), made / min(taken)],
            "speedup": median(a / b for a, b in zip(seconds[base][1:], taken, strict=True)),
            "accepted": 0.0,
            "bytes": bound,
        }
        rows.append(row | notes.get(name, {}))
    return rows


def _static(model, params, requests: Sequence[Request], size: int, capacity: int, *, warm: bool) -> float:
    """Seconds of batches in the order of arrival; `warm` makes one short batch of each compiled program only."""
    most, compiled = max(r.max_new for r in requests), set()
    started = time.perf_counter()
    for first in range(0, len(requests), size):
        part = list(requests[first : first + size])
        part += part[-1:] * (size - len(part))  # the last batch is of the same program
        if warm:
            full, rest = divmod(max(len(r.tokens) for r in part), BUCKETS[-1])
            programs = full > 0, next((width for width in (0, *BUCKETS) if width >= rest), None)
            if programs in compiled:
                continue
            compiled.add(programs)
        cache = Dense().init(model, batch=size, capacity=capacity)
        limits = [kvjax.Sampling(limit=2 if warm else r.max_new) for r in part]
        out = kvjax.generate(model, params, cache, [list(r.tokens) for r in part], max_new=most, sampling=limits)
        jax.block_until_ready(out.tokens)
    return time.perf_counter() - started


def _slots(model, params, requests: Sequence[Request], batches: Batches, capacity: int, pool: int):
    serving = open_slots(
        model,
        Paged(page=batches.page, pool=pool),
        slots=batches.slots,
        capacity=capacity,
        max_new=max(r.max_new for r in requests),
        store=POLICIES["workload_adaptive"],
        settings=Settings(chunk=512, steps=32),
    )
    started = time.perf_counter()
    results = list(serve(model, params, serving, requests))
    taken = time.perf_counter() - started
    assert len(results) == len(requests) and all(r.reason == "limit" for r in results)
    prompts = sum(len(r.tokens) for r in requests)
    return taken, {
        "reused": sum(r.reused for r in results) / prompts,
        "parked": sum(r.parked for r in results),
    }


def sample_rows(model, params, tokenizer, batches: Batches, new: int, turns: int, progress: Progress) -> list[Row]:
    """`samples` continuations of one prompt: in calls of their own, and all at once on one copy of the prompt."""
    prompt = tokenizer.encode(help_pages())[: batches.prompt]
    warm, n = kvjax.Sampling(temperature=0.8), batches.samples
    capacity = -(-(batches.prompt + new) // 64) * 64
    key = jax.random.key(0)

    def apart() -> int:
        held = 0
        for i in range(n):
            cache = Dense().init(model, batch=1, capacity=capacity)
            seeded = kvjax.Sampling(temperature=0.8, seed=i)
            out = kvjax.generate(model, params, cache, [prompt], max_new=new, key=key, sampling=seeded)
            jax.block_until_ready(out.tokens)
            held += kvjax.nbytes(out.cache)
        return held

    def together() -> int:
        cache = Dense().init(model, batch=1, capacity=batches.prompt)
        out = kvjax.sample_n(model, params, cache, [prompt], n=n, max_new=new, key=key, sampling=warm)
        jax.block_until_ready(out.tokens)
        return kvjax.nbytes(out.cache)

    ways = {f"{n} calls": apart, "sample_n": together}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    held: dict[str, int] = {}
    for turn in range(turns + 1):
        for number, (name, way) in enumerate(ways.items()):
            progress(f"samples, {name}", (turn + number / 2) / (turns + 1))
            started = time.perf_counter()
            held[name] = way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    pairs = {name: zip(seconds[f"{n} calls"], taken, strict=True) for name, taken in seconds.items()}
    return [
        {
            "method": name,
            "work": "samples",
            "batch": n,
            "tokens_per_s": n * new / median(taken),
            "range": [n * new / max(taken), n * new / min(taken)],
            "speedup": median(a / b for a, b in pairs[name]),
            "accepted": 0.0,
            "bytes": held[name],
        }
        for name, taken in seconds.items()
    ]
