"""Tokens a second on a CPU, kvjax and its peers in turn, on the same weights, prompts and cores.

Each engine runs in its own process, and only one computes at a time. The first round warms up and is thrown away;
of the others the median counts, and the range is shown. `ratio` is an engine's speed as a share of kvjax's own.
`agree` counts how many greedy tokens equal kvjax's before the first that does not; engines on quantised arithmetic
may differ early, float32 ones late or never.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.peers.client import Client, installed
from experiments.peers.convert import converted
from experiments.peers.work import Options, Timing, Work, shape
from experiments.registry import Progress, Row
from experiments.text import help_pages

OURS = "kvjax"


@dataclass(frozen=True)
class Config:
    """The fields of `bench_cpu.yaml`.

    Args:
        model: "smollm2" or a GGUF file.
        engines: names of `ENGINES`; kvjax is always measured.
        works: `decode-BATCH-CONTEXT` or `prefill-CONTEXT`.
        new: tokens decoded a row.
        rounds: measurements of each pair, after one that warms up.
        threads: cores and threads an engine may use.
        peer_python: the interpreter that has torch, transformers and llama-cpp-python; empty for this one.
    """

    model: str = "smollm2"
    engines: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    new: int = 64
    rounds: int = 5
    threads: int = 2
    peer_python: str = ""

    def __post_init__(self):
        for name in ("new", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench_cpu: `{name}` must be at least 1, got {getattr(self, name)}")
        if unknown := [name for name in self.engines if name not in ENGINES]:
            raise ValueError(f"bench_cpu: `engines` must be among {', '.join(ENGINES)}, got {unknown}")
        for name in self.works:
            shape(name)


@dataclass(frozen=True)
class Kind:
    """An engine: the module that serves it, its options, the weights' type and what must be installed."""

    serves: str
    options: Mapping[str, object]
    weights: str | None = None
    needs: tuple[str, ...] = ()
    works: tuple[str, ...] | None = None


_TORCH, _LLAMA = ("torch", "transformers", "gguf"), ("llama-cpp-python",)
ENGINES = {
    OURS: Kind("kvjax", {}),
    "kvjax stream": Kind("kvjax", {"stream": True}, works=("decode-1-128",)),
    "transformers dynamic": Kind("transformers", {"cache": "dynamic"}, needs=_TORCH),
    "transformers static": Kind("transformers", {"cache": "static"}, needs=_TORCH),
    "transformers compiled": Kind("transformers", {"cache": "static", "compiled": True}, needs=_TORCH),
    "llama.cpp F32": Kind("llama.cpp", {"kv": ["f16", "f32"]}, "F32", _LLAMA),  # 8-bit keys are other work
    "llama.cpp Q8_0": Kind("llama.cpp", {}, "Q8_0", _LLAMA),
    "llama.cpp Q4_1": Kind("llama.cpp", {}, None, _LLAMA),
}


def run(config: Config, progress: Progress) -> list[Row]:
    """Every engine on every work, by turns."""
    model = _file(config.model)
    names = list(dict.fromkeys((OURS, *config.engines)))
    absent = {name: lacking(config.peer_python, ENGINES[name].needs) for name in names}
    here = [name for name in names if not absent[name]]
    measured: dict[tuple[str, str], list[Timing]] = {}
    with ExitStack() as stack:
        clients: dict[str, Client] = {}
        for i, name in enumerate(here):
            progress(f"starting {name}", 0.1 * i / len(here))
            clients[name] = stack.enter_context(_start(name, config, model))
        works = make_works(config, clients[OURS])
        turns = [
            (work, turn, name)
            for work in works
            for turn in range(config.rounds + 1)
            for name in here
            if (only := ENGINES[name].works) is None or work.name in only
        ]
        for i, (work, turn, name) in enumerate(turns):
            progress(f"{name}: {work.name}" + ("" if turn else " (warming up)"), 0.1 + 0.9 * i / len(turns))
            timing = clients[name].measure(work)
            if turn:
                measured.setdefault((name, work.name), []).append(timing)
    counts = {work.name: work.counted for work in works}
    rows = [row(name, work, counts[work], measured) for work in counts for name in here if (name, work) in measured]
    return rows + [{"engine": name, "note": f"not installed: {line}"} for name, line in absent.items() if line]


def row(name: str, work: str, counted: int, measured: Mapping[tuple[str, str], list[Timing]]) -> Row:
    """A line of the table."""
    speeds = sorted(counted / timing.seconds for timing in measured[name, work])
    ours = median(counted / timing.seconds for timing in measured[OURS, work])
    timing, reference = measured[name, work][-1], measured[OURS, work][-1]
    pairs = list(zip(timing.tokens, reference.tokens, strict=True))
    agree = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "engine": name,
        "work": work,
        "tokens_per_s": median(speeds),
        "range": [speeds[0], speeds[-1]],
        "ratio": median(speeds) / ours,
        "agree": f"{agree}/{len(pairs)}",
        "note": timing.settings,
    }


def make_works(config: Config, ours: Client) -> list[Work]:
    """Prompts of real text, the same ids for every engine; rows of a batch differ."""
    shapes = {name: shape(name) for name in config.works}
    most = max((batch * context for batch, context, _ in shapes.values()), default=0)
    ids = ours.tokens(help_pages()[: 12 * most + 1000])
    works = []
    for name, (batch, context, decodes) in shapes.items():
        prompts = [ids[row * context : (row + 1) * context] for row in range(batch)]
        works.append(Work(name, prompts, config.new if decodes else 0))
    return works


def lacking(python: str, needs: tuple[str, ...]) -> str | None:
    """The line that installs what an engine needs and the interpreter lacks; None if all is there."""
    missing = [name for name, version in installed(python, needs).items() if version is None] if needs else []
    return f"{python or sys.executable} -m pip install {' '.join(missing)}" if missing else None


def environment(config: Config) -> Row:
    """Versions of the peers."""
    needs = sorted({need for name in config.engines for need in ENGINES[name].needs})
    return {"peers": installed(config.peer_python, tuple(needs)), "threads": config.threads}


def _start(name: str, config: Config, model: Path) -> Client:
    kind = ENGINES[name]
    weights = model if kind.weights is None else converted(model, kind.weights)
    options: Options = {"model": str(weights), "threads": config.threads, **kind.options}
    return Client(config.peer_python if kind.needs else "", kind.serves, options)


def _file(model: str) -> Path:
    if model == "smollm2":
        from kvjax.weights.default import default_model

        return default_model()
    path = Path(os.path.expanduser(model)).resolve()
    if path.suffix != ".gguf" or not path.is_file():
        raise ValueError(f"bench_cpu: `model` must be 'smollm2' or a .gguf file, which all engines read, got {model!r}")
    return path
