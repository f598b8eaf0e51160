"""Hit rates of the prefix store's policies on a trace of prompts, beside simpler ones and the optimum.

A block hits if it is held together with all before it when its prompt comes. Prompts take no time: each is served at
its arrival, its own blocks stay while it runs, and no more than `capacity` blocks are ever held: of a longer prompt
the first ones. `answer` lengths in the trace are known to the policies from a prompt's arrival on, as they would be a
few seconds later.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from experiments.prefix_baselines import Belady, Lfu, S3Fifo
from experiments.registry import Progress, Row
from kvjax.cache.prefix import POLICIES, Access, Lru, Policy, Predictive, replay

DATA = Path(__file__).parent / "data"
PROMPTS = ("arrival_ms", "input_length", "output_length")
"""A trace's arrays with one number a prompt."""

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
        fitting = _cut(accesses, capacity)
        measured: dict[str, tuple[int, float]] = {}
        for j, name in enumerate(names):
            progress(f"{name} at {capacity} blocks", (i + j / len(names)) / len(capacities))
            policy = BASELINES[name](fitting) if name in BASELINES else POLICIES[name]
            measured[name] = _timed(policy, capacity, fitting)
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
    """The prompts of a trace, in the order of their arrival; those without a block refer to nothing and are left out.

    Raises:
        ValueError: for a file that is no such trace, naming what is wrong with it.
    """
    stored = _arrays(path)
    starts, columns = stored["offsets"], [stored[name] for name in PROMPTS]
    prompts = len(starts) - 1
    if any(len(column) != prompts for column in columns):
        lengths = ", ".join(f"{len(stored[name])} of {name}" for name in PROMPTS)
        raise _wrong(path, f"{prompts} prompts in offsets, but {lengths}")
    if prompts < 1 or starts[0] != 0 or starts[-1] != len(stored["block_ids_delta"]) or (np.diff(starts) < 0).any():
        raise _wrong(path, "offsets must rise from 0 to the number of block ids")
    blocks, (arrivals, *lengths) = np.cumsum(stored["block_ids_delta"]).tolist(), columns
    if not np.isfinite(arrivals).all():
        raise _wrong(path, "arrival_ms must be finite")
    if any((column < 0).any() for column in lengths):
        raise _wrong(path, "lengths must not be negative")
    accesses = [
        Access(tuple(blocks[starts[k] : starts[k + 1]]), arrivals[k].item() / 1000, *_lengths(lengths, k, answers))
        for k in np.argsort(arrivals, kind="stable").tolist()
        if starts[k] < starts[k + 1]
    ]
    _check_paths(path, accesses)
    return accesses


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in (*PROMPTS, "offsets", "block_ids_delta")}
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, BadZipFile, zlib.error) as error:
        raise _wrong(path, str(error)) from error
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in ("iuf" if name == "arrival_ms" else "iu"):
            raise _wrong(path, f"{name} must be a row of whole numbers, got {array.dtype} {array.shape}")
    return arrays


def _lengths(columns: Sequence[np.ndarray], prompt: int, answers: bool) -> tuple[int, int | None]:
    tokens, answer = (column[prompt].item() for column in columns)
    return tokens, answer if answers else None


def _check_paths(path: Path, accesses: Sequence[Access]) -> None:
    """A block stands for its tokens and all before them, so it always follows the same one, and itself never."""
    if not accesses:
        raise _wrong(path, "it has no prompt with a block")
    before: dict[int, int] = {}
    for access in accesses:
        for last, block in zip((-1, *access.path), access.path, strict=False):
            if before.setdefault(block, last) != last:
                raise _wrong(path, f"block {block} follows both {before[block]} and {last}")


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"prefix_trace: `trace` must be as experiments/data/README.md says, {path}: {what}")


def _cut(accesses: Sequence[Access], capacity: int) -> list[Access]:
    """Prompts as a store of this capacity keeps them: of a longer one its first blocks."""
    return [a if len(a.path) <= capacity else replace(a, path=a.path[:capacity]) for a in accesses]


def _timed(policy: Policy, capacity: int, accesses: Sequence[Access]) -> tuple[int, float]:
    begun = time.perf_counter()
    return sum(replay(policy, capacity, accesses)), time.perf_counter() - begun
