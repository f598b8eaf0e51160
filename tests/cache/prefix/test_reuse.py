import numpy as np
import pytest

from kvjax.cache.prefix.beliefs import BINS, EDGES, Beliefs, beliefs, check_prior, factors
from kvjax.cache.prefix.features import Turn
from kvjax.cache.prefix.reuse import Reuse, followed, indices, note, refit


def learned(hazards: dict[int, float], prompts: int, remembered: int = 4096) -> tuple[Reuse, float]:
    """A model that saw first turns whose answer's length tells their constant hazard, ten seconds apart."""
    rng = np.random.default_rng(0)
    reuse = Reuse(remembered, beliefs("none"))
    ends = []
    for number in range(prompts):
        time = 10.0 * number
        answer = list(hazards)[number % len(hazards)]
        assert note(reuse, Turn(1, 1000, answer), time) == number
        if hazards[answer]:
            ends.append((time + rng.exponential(1 / hazards[answer]), number))
        for end in [end for end in ends if end[0] <= time]:
            ends.remove(end)
            followed(reuse, end[1], end[0], 1.0)
        refit(reuse, time)
    return reuse, 10.0 * (prompts - 1)


def test_hazards_are_learned_from_what_has_not_ended_too():
    reuse, time = learned({10: 0.02, 500: 0.002, 3000: 0.0}, 3000)
    fresh = [note(reuse, Turn(1, 1000, answer), time) for answer in (10, 500, 3000)]
    quick, slow, never = indices(reuse, np.array(fresh), time)
    assert quick == pytest.approx(0.02, rel=0.15)
    assert slow == pytest.approx(0.002, rel=0.3)
    assert never < 0.0003


def test_a_constant_hazard_is_its_own_index_at_any_age():
    reuse = Reuse(64, Beliefs(baseline=np.full(BINS, np.log(0.01))))
    numbers = np.array([note(reuse, Turn(1, 1000, None), time) for time in (0.0, 3.0, 900.0, 999.5)])
    np.testing.assert_allclose(indices(reuse, numbers, 1000.0), 0.01, rtol=1e-6)


@pytest.mark.parametrize("age", [0.0, 20.0, 100.0, 5000.0])
def test_the_index_is_the_best_rate_over_any_time_to_keep(age):
    reuse = Reuse(64, beliefs("chat"))
    number = note(reuse, Turn(1, 1000, 200), 0.0)
    step = 0.25
    ages = np.arange(age, 6000.0, step)
    model = np.exp(reuse.model.baseline + factors(reuse.model, reuse.seen.chosen[:1])[0])
    hazard = model[np.clip(np.searchsorted(EDGES, ages, side="right") - 1, 0, BINS - 1)]
    alive = np.exp(-np.cumsum(hazard) * step)
    kept = np.cumsum(np.concatenate([[1.0], alive[:-1]])) * step
    expected = ((1 - alive) / kept).max()
    assert indices(reuse, np.array([number]), age)[0] == pytest.approx(expected, rel=0.02)


def test_before_anything_is_seen_the_order_is_that_of_last_use():
    reuse = Reuse(64, beliefs("none"))
    numbers = np.array([note(reuse, Turn(1, 1000, None), float(time)) for time in range(0, 4000, 80)])
    worth = indices(reuse, numbers, 4000.0)
    assert (np.diff(worth) >= -1e-12).all() and len(set(worth.round(9))) > 10


def test_old_prompts_are_forgotten_and_worth_nothing():
    reuse, time = learned({10: 0.02}, 400, remembered=64)
    assert reuse.forgotten > 0 and 64 <= reuse.total - reuse.forgotten <= 128
    followed(reuse, 0, time, 1.0)
    worth = indices(reuse, np.array([0, reuse.forgotten, reuse.total - 1]), time)
    assert worth[0] == 0.0 and (worth[1:] > 0).all()
    assert worth[2] == pytest.approx(0.02, rel=0.5)


def test_priors_have_names():
    assert (beliefs("chat").steady != 0).any() and not beliefs("none").steady.any()
    with pytest.raises(ValueError, match="`prior` must be one of chat, none, got 'agents'"):
        check_prior("agents")
