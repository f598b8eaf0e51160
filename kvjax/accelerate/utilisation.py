"""How busy a device was, from a profiler's trace."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvjax.accelerate.roofline import Work

Span = tuple[float, float]
"""Begin and end, in nanoseconds of the trace's clock."""

Event = tuple[str, float, float]
"""Name, begin and end."""

COPIES = ("Memcpy", "Memset")
"""How the names of a GPU's events begin that are no kernels."""


@dataclass(frozen=True)
class Kernel:
    """All runs of the kernels of one name.

    Args:
        name: as the compiler called it.
        count: how often it ran.
        us: microseconds of all runs together.
    """

    name: str
    count: int
    us: float

    def bandwidth(self, work: Work) -> float:
        """Bytes a second, if each run does `work`."""
        return work.bytes * self.count / (1e-6 * self.us)


@dataclass(frozen=True)
class Utilisation:
    """Of one device in one trace.

    Args:
        device: as the profiler calls it.
        seconds: from the begin of the first kernel to the end of the last, or of the span that was asked for.
        busy: share of them in which at least one kernel ran, 0 to 1.
        copying: share in which memory was copied or filled by the driver, likewise.
        kernels: the heaviest first.
    """

    device: str
    seconds: float
    busy: float
    copying: float
    kernels: tuple[Kernel, ...]

    def bandwidth(self, work: Work, times: int = 1) -> float:
        """Bytes a second over all of `seconds`, the idle ones too, if `work` was done so many times in them."""
        return work.bytes * times / self.seconds


def utilisation(trace: str | Path, *, within: str | None = None, most: int = 20) -> tuple[Utilisation, ...]:
    """What `jax.profiler.trace(folder)` saw of each device on which a kernel ran.

    On a CPU operations of XLA that say what they compute count as kernels. A trace has what the profiler's buffers
    held: of millions of kernels it may miss some.

    Args:
        trace: the folder, whose newest session is read, or an `.xplane.pb` file.
        within: the name of a `jax.profiler.TraceAnnotation`; only what ran inside counts, over the time that all its
            spans took together. None takes each device's time from its first kernel to its last.
        most: kernels to name.
    Raises:
        FileNotFoundError: if there is no trace.
        ValueError: if no kernel ran in it, or nothing was annotated so.
    """
    from jax.profiler import ProfileData

    path = newest(Path(trace))
    planes = list(ProfileData.from_file(str(path)).planes)
    spans = None if within is None else annotated(planes, within)
    if spans == []:
        raise ValueError(f"utilisation: {path} has no TraceAnnotation {within!r}")
    found = []
    for plane in planes:
        events = device_events(plane)
        if any(not name.startswith(COPIES) for name, _, _ in events):
            found.append(summary(plane.name, events, spans, most))
    if not found:
        names = ", ".join(plane.name for plane in planes)
        raise ValueError(
            f"utilisation: no kernel ran in {path} (it has {names}); trace a compiled program, and wait for its result"
        )
    return tuple(found)


def newest(trace: Path) -> Path:
    """The file of the newest session below a folder; a file is itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    if trace.is_file():
        return trace
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise FileNotFoundError(f"utilisation: no *.xplane.pb below {trace}; expected what jax.profiler.trace wrote")
    return files[-1]


def device_events(plane: Any) -> list[Event]:
    """What ran on a plane's device."""
    gpu = plane.name.startswith("/device:")
    lines = list(plane.lines) if gpu or plane.name == "/host:CPU" else []
    streams = [line for line in lines if line.name.startswith("Stream")]  # others repeat what streams ran
    return [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in streams or lines
        for event in _events(line)
        if event.duration_ns > 0
        and (gpu or (not event.name.startswith("end: ") and any(name == "hlo_op" for name, _ in event.stats)))
    ]


def annotated(planes: Sequence[Any], name: str) -> list[Span]:
    """Where the host was inside an annotation of this name."""
    return [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in _events(line)
        if event.name == name
    ]


def summary(device: str, events: Sequence[Event], spans: list[Span] | None, most: int) -> Utilisation:
    """A `Utilisation` of events, of which only what lies in `spans` counts; None for all from first to last."""
    kernels = [event for event in events if not event[0].startswith(COPIES)]
    if spans is None:
        spans = [(min(begin for _, begin, _ in kernels), max(end for _, _, end in kernels))]
    spans = union(spans)
    total = sum(end - begin for begin, end in spans)
    ran = clipped([(begin, end) for _, begin, end in kernels], spans)
    copied = clipped([(begin, end) for name, begin, end in events if name.startswith(COPIES)], spans)
    by_name: dict[str, list[float]] = {}
    for name, begin, end in kernels:
        if inside := sum(b - a for a, b in clipped([(begin, end)], spans)):
            by_name.setdefault(name, []).append(inside)
    named = [Kernel(name, len(ns), sum(ns) / 1e3) for name, ns in by_name.items()]
    named.sort(key=lambda kernel: -kernel.us)
    share = [sum(end - begin for begin, end in union(part)) / total for part in (ran, copied)]
    return Utilisation(device, total / 1e9, *share, tuple(named[:most]))


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def clipped(spans: Iterable[Span], inside: Sequence[Span]) -> list[Span]:
    """What of spans lies in others, which do not touch and are in order."""
    begins = [begin for begin, _ in inside]
    parts = []
    for begin, end in spans:
        for low, high in inside[max(bisect_right(begins, begin) - 1, 0) :]:
            if low >= end:
                break
            if high > begin:
                parts.append((max(begin, low), min(end, high)))
    return parts


def _events(line: Any) -> list[Any]:
    """JAX warns of a deprecation while it makes these, and where warnings are errors Python aborts there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = list(line.events)
        for event in events[:1]:
            list(event.stats)
    return events
