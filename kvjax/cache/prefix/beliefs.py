"""The hazard of reuse by age and features: its form, and what is believed of it before a trace begins."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache, reduce
from importlib.resources import files

import numpy as np
from jaxtyping import Float, Int

from kvjax.cache.prefix.features import TIMED, WEIGHTS

EDGES = np.concatenate([[0.0], 4.0 * 2.0 ** (np.arange(22) / 2)])
"""Ages, in seconds, at which the baseline changes; past the last it stays."""
WIDTHS = np.diff(EDGES)
BINS = len(WIDTHS)
PERIOD = np.searchsorted([45.0, 128.0], EDGES[:-1], side="right")
"""Each bin's period of age: early, usual, late. Features in `TIMED` have a factor for each."""
PERIODS = 3
FALLING = 0.3 / (60.0 + np.sqrt((EDGES[:-1] + 1.0) * EDGES[1:]))
"""A hazard, per second, that falls with age and knows no features: the order that it gives is that of last use."""


@dataclass(frozen=True)
class Beliefs:
    """Logarithms of the baseline hazard, per second, and of the factors of features."""

    baseline: Float[np.ndarray, "bins"] = field(default_factory=lambda: np.log(FALLING))
    steady: Float[np.ndarray, "weights"] = field(default_factory=lambda: np.zeros(WEIGHTS))
    timed: Float[np.ndarray, "periods weights"] = field(default_factory=lambda: np.zeros((PERIODS, WEIGHTS)))


def factors(model: Beliefs, chosen: Int[np.ndarray, "prompts features"]) -> Float[np.ndarray, "prompts bins"]:
    """The logarithm of each prompt's factor on the baseline, by age."""
    timed = np.stack([_total(weights, chosen[:, TIMED]) for weights in model.timed], 1)
    return _total(model.steady, chosen)[:, None] + timed[:, PERIOD]


def _total(
    weights: Float[np.ndarray, "weights"], chosen: Int[np.ndarray, "prompts features"]
) -> Float[np.ndarray, "prompts"]:
    """Each prompt's chosen weights, summed; a feature at a time, as numpy is slow at sums of few."""
    return reduce(np.add, (weights[column] for column in chosen.T))


PRIORS = ("chat", "none")


def check_prior(name: str) -> None:
    """Refuse a prior that is not there.

    Raises:
        ValueError: naming those that are.
    """
    if name not in PRIORS:
        raise ValueError(f"`prior` must be one of {', '.join(PRIORS)}, got {name!r}")


@cache
def beliefs(name: str) -> Beliefs:
    """What may be believed beforehand.

    Args:
        name: "none", or "chat": fitted to 3,007 prompts of people talking to an assistant, the first half of
            `experiments/data/mooncake_conv_first_half.npz`, by `python -m experiments.prefix_prior`.
    """
    check_prior(name)
    if name == "none":
        return Beliefs()
    stored = json.loads(files("kvjax.cache.prefix").joinpath("chat_prior.json").read_text())
    return Beliefs(**{key: np.array(value) for key, value in stored.items()})
