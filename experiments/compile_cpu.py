"""What compiling costs: from the command line to the first token, and over many prompt lengths.

A start is timed from before the process exists until the first byte of its answer. For a first start the folder of
compiled programs is empty; the second finds what the first left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from experiments.registry import Progress, Row


@dataclass(frozen=True)
class Config:
    """The fields of `compile_cpu.yaml`.

    Args:
        model: "smollm2", or whatever `kvjax.load` takes.
        prompt: what is asked at each start.
        rounds: pairs of a first and a second start; 0 leaves them out.
        lengths: how many different prompt lengths, 1 up; 0 leaves them out.
        layers: layers kept for the lengths; the number of programs does not depend on it, their compile time does.
    """

    model: str = "smollm2"
    prompt: str = "What is the capital of France?"
    rounds: int = 3
    lengths: int = 1000
    layers: int = 1

    def __post_init__(self):
        for name, least in (("rounds", 0), ("lengths", 0), ("layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"compile_cpu: `{name}` must be at least {least}, got {getattr(self, name)}")


def run(config: Config, progress: Progress) -> list[Row]:
    """Starts by turns, then the lengths in this process."""
    starts: list[tuple[float, float]] = []
    for i in range(config.rounds):
        with tempfile.TemporaryDirectory(prefix="kvjax-") as folder:
            progress(f"first start {i + 1}", 0.8 * i / config.rounds)
            first = first_token(config, Path(folder))
            progress(f"second start {i + 1}", 0.8 * (i + 0.6) / config.rounds)
            starts.append((first, first_token(config, Path(folder))))
    rows: list[Row] = []
    if starts:
        firsts, seconds = (sorted(column) for column in zip(*starts, strict=True))
        ratio = median(first / second for first, second in starts)
        rows += [
            {"work": "first start, s to first token", "value": median(firsts), "range": [firsts[0], firsts[-1]]},
            {"work": "second start, s to first token", "value": median(seconds), "range": [seconds[0], seconds[-1]]},
            {"work": "first start / second start", "value": ratio, "asked": "at least 2"},
        ]
    if config.lengths:
        progress(f"{config.lengths} prompt lengths", 0.8)
        compiles, buckets = compiles_for_lengths(config)
        name = f"programs compiled for {config.lengths} prompt lengths"
        rows.append({"work": name, "value": compiles, "asked": f"at most {buckets}, the number of buckets"})
    return rows


def first_token(config: Config, folder: Path) -> float:
    """Seconds until `kvjax generate` writes its first byte, with compiled programs in `folder`.

    Raises:
        RuntimeError: with what the process said, if it wrote nothing.
    """
    command = [sys.executable, "-m", "kvjax", "generate", config.prompt, "--max-new", "8", "--model", config.model]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    byte = process.stdout.read(1)
    seconds = time.perf_counter() - begun
    _, said = process.communicate()
    if not byte:
        text = said.decode(errors="replace").strip()
        raise RuntimeError(f"compile_cpu: kvjax generate wrote nothing; it said: {text}")
    return seconds


def compiles_for_lengths(config: Config) -> tuple[int, int]:
    """Programs that depend on the prompt's length, and the number of buckets.

    One prompt goes first, and with it the program of its bucket and all that does not depend on a length.
    """
    import jax

    import kvjax
    from kvjax.decode import BUCKETS

    model, params, _ = kvjax.load(config.model)
    shallow = replace(model.config, windows=model.config.windows[: config.layers])
    model = kvjax.Transformer(shallow, model.precision)
    params = {**params, "layers": params["layers"][: config.layers]}
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def ask(length: int) -> None:
        cache = kvjax.cache.Dense().init(model, batch=1, capacity=config.lengths + 2)
        prompt = [[i % model.config.vocab for i in range(length)]]
        kvjax.generate(model, params, cache, prompt, max_new=2).tokens.block_until_ready()

    ask(BUCKETS[0])
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for length in range(1, config.lengths + 1):
            ask(length)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return len(compiled) + 1, len(BUCKETS)
