"""Hit rates of the prefix store's policies on a trace of prompts, beside simpler ones and the optimum.

A block hits if it is held together with all before it when its prompt comes. Prompts take no time: each is served at
its arrival, its own blocks stay while it runs, and no more than `capacity` blocks are ever held. `answer` lengths in
the trace are known to the policies from a prompt's arrival on, as they would be a few seconds later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.prefix_baselines import Belady, Lfu, S3Fifo
from experiments.registry import Progress, Row
from kvjax.cache.prefix import POLICIES, Access, Lru, Policy, Predictive, replay

DATA = Path(__file__).parent / "data"

BASELINES: dict[str, Callable[[Sequence[Access]], Policy]] = {
    "lfu": lambda accesses: Lfu(),
    "lfu_da": lambda accesses: Lfu(aging=True),
    "s3_fifo": lambda accesses: S3Fifo(),
    "predictive, no prior": lambda accesses: Predictive(prior="none"),
    "belady": Belady.of,
}


@dataclass(frozen=True)
class Config:
    """The fields of `prefix_trace.yaml`.

    Args:
        trace: an .npz file as `experiments/data/README.md` describes; its bare name if it lies there.
        capacities: blocks.
        shares: more capacities, as shares of the trace's distinct blocks.
        policies: names of `POLICIES` and `BASELINES`; "lru" and "belady" are always measured.
        skip: share of the trace's prompts, from its beginning, that are left out.
        answers: tell the policies how long answers were.
    """

    trace: str = "mooncake_conv_first_half.npz"
    capacities: tuple[int, ...] = (1000, 2000, 5000, 8000, 20000)
    shares: tuple[float, ...] = ()
    policies: tuple[str, ...] = (*POLICIES, *BASELINES)
    skip: float = 0.0
    answers: bool = True

    def __post_init__(self):
        known = (*POLICIES, *BASELINES)
        if unknown := [name for name in self.policies if name not in known]:
            raise ValueError(f"prefix_trace: `policies` must be among {', '.join(known)}, got {unknown}")
        if any(capacity < 1 for capacity in self.capacities):
            raise ValueError(f"prefix_trace: `capacities` must be at least 1, got {list(self.capacities)}")
        if any(not 0 < share <= 1 for share in self.shares):
            raise ValueError(f"prefix_trace: `shares` must be above 0 and at most 1, got {list(self.shares)}")
        if not 0 <= self.skip < 1:
            raise ValueError(f"prefix_trace: `skip` must be at least 0 and below 1, got {self.skip}")


def run(config: Config, progress: Progress) -> list[Row]:
    """Every policy at every capacity; `gap_closed` is 0 for LRU and 1 for the optimum."""
    accesses = read(find(config.trace), answers=config.answers)
    accesses = accesses[int(config.skip * len(accesses)) :]
    references = sum(len(access.path) for access in accesses)
    distinct = len({block for access in accesses for block in access.path})
    capacities = dict.fromkeys([*config.capacities, *(max(1, round(share * distinct)) for share in config.shares)])
    names = list(dict.fromkeys(["lru", "belady", *config.policies]))
    reusable, seconds = _timed(Lru(), distinct, accesses)
    rows: list[Row] = [
        {"policy": "infinite", "capacity": distinct, "hit_rate": reusable / references, "seconds": seconds}
    ]
    for i, capacity in enumerate(capacities):
        measured: dict[str, tuple[int, float]] = {}
        for j, name in enumerate(names):
            progress(f"{name} at {capacity} blocks", (i + j / len(names)) / len(capacities))
            policy = BASELINES[name](accesses) if name in BASELINES else POLICIES[name]
            measured[name] = _timed(policy, capacity, accesses)
        low, high = measured["lru"][0], measured["belady"][0]
        for name, (hits, seconds) in measured.items():
            rows.append(
                {
                    "policy": name,
                    "capacity": capacity,
                    "hit_rate": hits / references,
                    "gap_closed": (hits - low) / (high - low) if high > low else None,
                    "of_reusable": hits / reusable if reusable else None,
                    "seconds": seconds,
                }
            )
    return rows


def find(trace: str) -> Path:
    """The file that a path, or the bare name of one in `experiments/data/`, means.

    Raises:
        ValueError: if there is none.
    """
    for path in (Path(trace).expanduser(), DATA / trace):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in DATA.glob("*.npz")))
    raise ValueError(f"prefix_trace: `trace` must be an .npz file, or one of {known}, got {trace!r}")


def read(path: Path, *, answers: bool = True) -> list[Access]:
    """The prompts of a trace.

    Raises:
        ValueError: for a file that is no such trace.
    """
    try:
        with np.load(path) as stored:
            blocks = np.cumsum(stored["block_ids_delta"]).tolist()
            starts = stored["offsets"].tolist()
            columns = [stored[name].tolist() for name in ("arrival_ms", "input_length", "output_length")]
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"prefix_trace: `trace` must be as experiments/data/README.md says, {path}: {error}"
        ) from error
    return [
        Access(tuple(blocks[start:end]), at / 1000, tokens, answer if answers else None)
        for start, end, at, tokens, answer in zip(starts[:-1], starts[1:], *columns, strict=True)
    ]


def _timed(policy: Policy, capacity: int, accesses: Sequence[Access]) -> tuple[int, float]:
    begun = time.perf_counter()
    return sum(replay(policy, capacity, accesses)), time.perf_counter() - begun
