"""When a conversation goes on: its hazard by age and features, learned from the trace as it goes.

The hazard of a stored prompt is the rate, per second, at which a later prompt reuses its blocks, given that none did
up to its age. It is a baseline, constant within a bin of age, times a factor for each feature: a Poisson regression on
time at risk. Prompts not yet followed count for the time they were watched, so nothing has to be known of the future.

Sources: Holford 1980, "The analysis of rates and of survivorship using log-linear models" (Biometrics 36); the index:
Gittins 1979, "Bandit processes and dynamic allocation indices" (J. R. Stat. Soc. B 41).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from kvjax.cache.prefix.beliefs import BINS, EDGES, PERIOD, PERIODS, WIDTHS, Beliefs, factors
from kvjax.cache.prefix.features import SIZES, TIMED, WEIGHTS, Turn, levels

FIRST_FIT = 32


@dataclass
class Seen:
    """What was seen of the last prompts, a row each.

    Args:
        chosen: levels of the features.
        begun: when, in seconds.
        lasted: seconds until a later prompt reused its blocks, infinite up to then.
        share: how much of it that prompt reused, 0 to 1.
    """

    chosen: Int[np.ndarray, "rows features"]
    begun: Float[np.ndarray, "rows"]
    lasted: Float[np.ndarray, "rows"]
    share: Float[np.ndarray, "rows"]


@dataclass
class Reuse:
    """The last prompts, and the model fitted to them.

    Args:
        remembered: prompts that are kept when older ones are forgotten; there may be twice as many.
        prior: what the model is shrunk to.
        forgotten, total, fitted: prompts no longer known, ever seen, and seen at the last fit.
    """

    remembered: int
    prior: Beliefs
    model: Beliefs = field(init=False)
    seen: Seen = field(init=False)
    forgotten: int = 0
    total: int = 0
    fitted: int = 0

    def __post_init__(self):
        rows = 2 * self.remembered
        self.model = self.prior
        self.seen = Seen(np.zeros((rows, len(SIZES)), np.int64), np.zeros(rows), np.full(rows, np.inf), np.zeros(rows))


def note(reuse: Reuse, turn: Turn, time: float) -> int:
    """Write a prompt down; its number is one more than that of the prompt before."""
    seen, row = reuse.seen, reuse.total - reuse.forgotten
    if row == len(seen.begun):
        row = reuse.remembered
        for array in (seen.chosen, seen.begun, seen.lasted, seen.share):
            array[:row] = array[row:]
        seen.lasted[row:], seen.share[row:] = np.inf, 0.0
        reuse.forgotten += row
    seen.chosen[row] = levels(turn)
    seen.begun[row] = time
    reuse.total += 1
    return reuse.total - 1


def followed(reuse: Reuse, number: int, time: float, share: float) -> None:
    """A later prompt reused a share, 0 to 1, of a prompt's blocks. Forgotten prompts do not count."""
    row = number - reuse.forgotten
    if row >= 0:
        reuse.seen.lasted[row] = time - reuse.seen.begun[row]
        reuse.seen.share[row] = share


def refit(reuse: Reuse, time: float, *, weight: float = 8.0, sweeps: int = 5) -> None:
    """Fit the model to what was seen, if a sixteenth of it is new.

    The baseline and each factor in turn are set to their posterior means under Gamma priors, the others held fixed.

    Args:
        weight: events that the prior of a factor counts for; that of the baseline counts for a quarter, in each bin.
        sweeps: times round all factors, starting from those of the last fit.
    """
    rows = reuse.total - reuse.forgotten
    if reuse.total < FIRST_FIT or reuse.total - reuse.fitted < max(16, rows // 16):
        return
    reuse.fitted = reuse.total
    chosen, lasted, share = reuse.seen.chosen[:rows], reuse.seen.lasted[:rows], reuse.seen.share[:rows]
    watched = np.minimum(lasted, time - reuse.seen.begun[:rows])
    risk = np.clip(watched[:, None] - EDGES[:-1], 0.0, WIDTHS)
    at = np.clip(np.searchsorted(EDGES, lasted) - 1, 0, BINS - 1)
    events = np.bincount(at, share, BINS)
    by_period = [np.where(PERIOD[at] == period, share, 0.0) for period in range(PERIODS)]
    prior, model = reuse.prior, reuse.model
    steady, timed = model.steady.copy(), model.timed.copy()
    for _ in range(sweeps):
        hazard = np.exp(factors(Beliefs(model.baseline, steady, timed), chosen)) * risk
        baseline = np.log((events + weight / 4) / (hazard.sum(0) + weight / 4 * np.exp(-prior.baseline)))
        hazard *= np.exp(baseline)
        expected = np.stack([hazard[:, period == PERIOD].sum(1) for period in range(PERIODS)])
        for levels_ in chosen.T:
            step = _step(levels_, share, expected.sum(0), steady, prior.steady, weight)
            steady += step
            expected *= np.exp(step)[levels_]
        for levels_ in chosen[:, TIMED].T:
            for period, happened in enumerate(by_period):
                step = _step(levels_, happened, expected[period], timed[period], prior.timed[period], weight)
                timed[period] += step
                expected[period] *= np.exp(step)[levels_]
        reuse.model = Beliefs(baseline, steady, timed)


def _step(
    levels_: Int[np.ndarray, "rows"],
    happened: Float[np.ndarray, "rows"],
    expected: Float[np.ndarray, "rows"],
    now: Float[np.ndarray, "weights"],
    before: Float[np.ndarray, "weights"],
    weight: float,
) -> Float[np.ndarray, "weights"]:
    """How far each log factor of a feature moves: events by expected events, shrunk to what was believed before."""
    foreseen = np.bincount(levels_, expected, WEIGHTS)
    events = np.bincount(levels_, happened, WEIGHTS)
    step = np.log((events + weight) / (foreseen * np.exp(-now) + weight * np.exp(-before))) - now
    return np.where(foreseen > 0.0, step, 0.0)


def indices(reuse: Reuse, numbers: Int[np.ndarray, "prompts"], time: float) -> Float[np.ndarray, "prompts"]:
    """What keeping a block of each prompt is worth: its Gittins index, in reuses a second; 0 for a forgotten prompt.

    Keeping a block from its present age for some while costs the time until it is reused or the while is over, and
    gains one reuse or none. The index is the greatest ratio of the expectations, over whiles to the ends of bins.
    """
    rows = np.maximum(numbers - reuse.forgotten, 0)
    age = np.minimum(time - reuse.seen.begun[rows], EDGES[-2])
    hazard = np.exp(np.minimum(reuse.model.baseline + factors(reuse.model, reuse.seen.chosen[rows]), 0.0))
    left = np.clip(EDGES[1:] - age[:, None], 0.0, WIDTHS)
    alive = np.exp(-np.cumsum(hazard * left, 1))
    gain = -np.diff(alive, axis=1, prepend=1.0)
    spent = np.cumsum(gain / hazard, 1)
    worth = ((1.0 - alive) / np.maximum(spent, 1e-9)).max(1)
    return np.where(numbers < reuse.forgotten, 0.0, worth)
