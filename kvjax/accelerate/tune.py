"""Find the fastest sizes of a kernel for a shape: compile, check against the reference, time in turns, keep the winner.

A config that does not compile, or whose result is not the reference's, is refused with the reason. Times are of inputs
that are not in cache; the configs take turns, so that a change of the machine's speed meets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from kvjax.accelerate.device import cache_bytes
from kvjax.accelerate.roofline import Work
from kvjax.accelerate.timing import cold_bytes, microseconds

MOST_INPUTS = 4096
"""Sets of inputs that take turns, at most."""

SLOW = 1.5
"""Times the fastest config's first median beyond which a config gets no further turns."""

Config = TypeVar("Config")


def _as_they_are(config: Any, *inputs: Any) -> tuple:
    return inputs


@dataclass(frozen=True)
class Operation(Generic[Config]):
    """What is tuned.

    Args:
        name: under which its winners are kept.
        call: from a config, a frozen dataclass, and inputs to a result; jitted here.
        reference: from the same inputs to what the result must be, of the same structure.
        far: largest error of any row of a result, as a share of that row's norm; one for each array of the result.
        arrange: from a config and inputs to what `call` is given, for what depends on the config but is made once for
            many calls; not timed.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    far: tuple[float, ...] = (1e-2,)
    arrange: Callable[..., tuple] = _as_they_are


@dataclass(frozen=True)
class Case:
    """A shape to tune for.

    Args:
        exact: settings that another shape must share to use the winner, such as a dtype.
        sizes: sizes that may differ a little.
        draw: from a key to inputs of one call.
        work: of one call, for the share of the roofline.
    """

    exact: Mapping[str, int | str]
    sizes: Mapping[str, int]
    draw: Callable[[Key[Array, ""]], tuple]
    work: Work


@dataclass(frozen=True)
class Trial(Generic[Config]):
    """What became of a config.

    Args:
        us: microseconds of every call that was timed; the median is what counts.
        errors: the largest of any row, as `Operation.far` has them; empty if it did not come to that.
        refused: why it cannot win; None if it can.
    """

    config: Config
    us: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    refused: str | None = None

    @property
    def median(self) -> float:
        """Microseconds; infinity where it was not timed."""
        return median(self.us) if self.us else float("inf")


def tune(
    operation: Operation[Config],
    case: Case,
    configs: Sequence[Config],
    *,
    calls: int = 12,
    turns: int = 3,
    cold: int | None = None,
    seed: int = 0,
    tell: Callable[[str, float], None] = lambda doing, done: None,
) -> tuple[Trial[Config], ...]:
    """Try configs for one shape; the fastest first, then those that were refused.

    Args:
        calls: of a config in a turn.
        turns: in which the configs follow each other. Who is far behind after the first gets no others.
        cold: bytes of inputs that take turns; None for what leaves nothing in the device's cache.
        seed: of the inputs.
        tell: hears what is being done, and the share of the whole that is behind.
    Raises:
        ValueError: without configs, turns or calls, or if inputs are so small that they cannot be timed out of cache.
    """
    if not configs or turns < 1 or calls < 1:
        raise ValueError(f"tune: expected configs, turns and calls, got {len(configs)}, {turns} and {calls}")
    inputs = draw_cold(case, calls, cold, seed)
    wants = [jax.jit(operation.reference)(*x) for x in inputs[:2]]
    trials, ready = [], {}
    for i, config in enumerate(configs):
        tell(f"checking {config}", 0.5 * i / len(configs))
        trial, call, arranged = _checked(operation, config, inputs, wants)
        trials.append(trial)
        if trial.refused is None:
            ready[i] = call, arranged
    for turn in range(turns):
        best = min((trials[i].median for i in ready), default=0.0)
        racing = [i for i in ready if not turn or trials[i].median <= SLOW * best]
        for nth, i in enumerate(racing):
            tell(f"timing {configs[i]}", 0.5 + 0.5 * (turn + nth / len(racing)) / turns)
            trials[i] = replace(trials[i], us=(*trials[i].us, *microseconds(*ready[i], calls)))
    for i, (call, arranged) in ready.items():  # once more: a race between threads need not show at the first call
        trials[i] = _judged(operation, trials[i], [call(*x) for x in arranged[: len(wants)]], wants)
    return tuple(sorted(trials, key=lambda trial: (trial.refused is not None, trial.median)))


def draw_cold(case: Case, calls: int, cold: int | None = None, seed: int = 0) -> list[tuple]:
    """As many inputs as leave none of themselves in cache when they take turns.

    On a GPU, where each of `calls` calls is timed once after the cache was emptied, `calls` of them do.

    Raises:
        ValueError: if more than `MOST_INPUTS` are needed.
    """
    device = jax.local_devices()[0]
    cold = cold_bytes(cache_bytes(device), device.platform) if cold is None else cold
    key = jax.random.key(seed)
    first = case.draw(jax.random.fold_in(key, 0))
    size = sum(x.nbytes for x in jax.tree.leaves(first))
    count = -(-cold // size)
    if jax.default_backend() == "gpu":
        count = min(count, calls)
    if count > MOST_INPUTS:
        raise ValueError(
            f"tune: inputs of {size} bytes need {count} sets to take turns out of cache, expected {MOST_INPUTS} at "
            "most: tune a larger shape"
        )
    return [first, *(case.draw(jax.random.fold_in(key, i)) for i in range(1, count))]


def row_errors(got: Any, want: Any) -> tuple[float, ...]:
    """Of each array of a result the largest error of any row (its last axis), as a share of that row's norm.

    A row that should be zero must be; infinities must be where they should be. NaN is infinitely far.

    Raises:
        ValueError: if the results are not of one structure and shape.
    """
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise ValueError(f"expected a result like {jax.tree.structure(want)}, got {jax.tree.structure(got)}")
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    if wrong := [(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]:
        raise ValueError(f"expected a result of shape {wrong[0][1]}, got {wrong[0][0]}")
    return tuple(float(_worst(a, b)) for a, b in pairs)


def row_of(operation: str, case: Case, trials: Sequence[Trial[Any]], bound_us: float, **more: Any) -> dict[str, Any]:
    """The winner of `tune` as a row of a tuned table, with `more` of where and when.

    Args:
        bound_us: microseconds of the roofline.
    Raises:
        ValueError: if every config was refused, with the reasons.
    """
    best = trials[0]
    if best.refused is not None:
        raise ValueError(f"tune: {operation} has no config for {case.sizes}: {[t.refused for t in trials]}")
    return {
        "operation": operation,
        "exact": dict(case.exact),
        "sizes": dict(case.sizes),
        "config": asdict(best.config),
        "us": best.median,
        "range": [min(best.us), max(best.us)],
        "share": bound_us / best.median,
        "errors": list(best.errors),
        "tried": len(trials),
        "refused": sum(trial.refused is not None for trial in trials),
        **more,
    }


def _checked(operation: Operation[Config], config: Config, inputs: list[tuple], wants: list):
    """A trial that is refused or may be timed, the compiled call, and what it is given."""
    call, arranged = None, []
    try:
        arranged = [operation.arrange(config, *x) for x in inputs]
        call = jax.jit(lambda *x: operation.call(config, *x)).lower(*arranged[0]).compile()
        got = [call(*x) for x in arranged[: len(wants)]]
        return _judged(operation, Trial(config), got, wants), call, arranged
    except Exception as error:  # whatever tracing, a compiler or a device raises is a reason to refuse
        return Trial(config, refused=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"), call, arranged


def _judged(operation: Operation[Config], trial: Trial[Config], got: list, wants: list) -> Trial[Config]:
    each = [row_errors(a, b) for a, b in zip(got, wants, strict=True)] + ([trial.errors] if trial.errors else [])
    errors = tuple(max(some) for some in zip(*each, strict=True))
    if len(errors) != len(operation.far):
        raise ValueError(f"`far` of {operation.name} must have {len(errors)} entries, got {operation.far}")
    if all(error <= far for error, far in zip(errors, operation.far, strict=True)):
        return replace(trial, errors=errors)
    spelled = ", ".join(f"{error:.3g}" for error in errors)
    return replace(trial, errors=errors, refused=f"expected errors up to {operation.far}, got {spelled}")


@jax.jit
def _worst(got: Shaped[Array, "*shape"], want: Shaped[Array, "*shape"]) -> Float[Array, ""]:
    got, want = (jnp.atleast_1d(x.astype(jnp.float32)) for x in (got, want))
    same = got == want  # infinities too
    apart = jnp.where(same, 0.0, got - want)
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(want), want, 0.0), axis=-1)
    off = jnp.linalg.norm(apart, axis=-1)
    error = jnp.where(off == 0, 0.0, off / size).max(initial=0.0)
    return jnp.where(jnp.isnan(error), jnp.inf, error)
