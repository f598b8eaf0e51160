"""The tuner, on a real operation of a CPU: attention by blocks of slots, whose size is the config."""

from dataclasses import dataclass
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import Mask, attend, attend_blocks
from kvjax.accelerate.roofline import decode_attention
from kvjax.accelerate.tune import Case, Operation, Trial, draw_cold, row_errors, row_of, tune

module = import_module("kvjax.accelerate.tune")
SLOTS = 96
MASK = Mask(0.25)
AT, HELD = jnp.full((2, 1), SLOTS - 1, jnp.int32), jnp.tile(jnp.arange(SLOTS, dtype=jnp.int32)[None], (2, 1))


@dataclass(frozen=True)
class Block:
    """Slots at once; the last block is left out where it is not `whole`."""

    size: int
    whole: bool = True


def blocked(config, q, k, v, held):
    def load(first, count):
        return tuple(jax.lax.dynamic_slice_in_dim(x[: 2 * count], first, config.size, 1) for x in (k, v))

    if SLOTS % config.size:
        raise ValueError(f"expected a size that divides {SLOTS}, got {config.size}")
    return attend_blocks(q, held, load, config.size, AT, MASK)


def held_slots(config, q, k, v):
    return q, k, v, HELD if config.whole else jnp.where(HELD + config.size < SLOTS, HELD, -1)


def draw(key):
    shapes = ((2, 1, 4, 16), (4, SLOTS, 16), (4, SLOTS, 16))
    return tuple(jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, 3), shapes, strict=True))


ATTEND = Operation(
    "blocks", blocked, lambda q, k, v: attend(q, k, v, AT, HELD, MASK), far=(1e-5, 1e-5), arrange=held_slots
)
CASE = Case(
    exact={"dtype": "float32"},
    sizes={"slots": SLOTS},
    draw=draw,
    work=decode_attention(2, SLOTS, heads=4, kv_heads=2, head_dim=16, dtype="float32"),
)
CONFIGS = (Block(32), Block(48, whole=False), Block(48), Block(50), Block(96))


@pytest.fixture
def clock(monkeypatch):
    """Microseconds of each config in its next turn, and the inputs that were timed."""
    us = {32: [5.0, 30.0], 48: [7.0, 4.0], 96: [100.0]}
    seen = []

    def timed(call, inputs, calls):
        size = sizes[len(seen)]
        seen.append(inputs)
        return [us[size].pop(0)] * calls

    sizes = [32, 48, 96, 32, 48]
    monkeypatch.setattr(module, "microseconds", timed)
    return seen


def test_a_wrong_config_is_refused_and_the_fastest_of_the_others_wins(clock):
    us = [5.0, 30.0, 7.0, 4.0]
    trials = tune(ATTEND, CASE, CONFIGS, calls=3, turns=2, cold=10**5)
    assert [trial.config for trial in trials[:3]] == [Block(48), Block(32), Block(96)]
    assert [trial.median for trial in trials[:3]] == [(us[2] + us[3]) / 2, (us[0] + us[1]) / 2, 100.0]
    assert [len(trial.us) for trial in trials[:3]] == [6, 6, 3]  # the last was far behind after a turn
    refused = {trial.config: trial.refused for trial in trials[3:]}
    assert "expected errors up to (1e-05, 1e-05), got" in refused[Block(48, whole=False)]
    assert refused[Block(50)] == "ValueError: expected a size that divides 96, got 50"
    assert all(trial.us == () for trial in trials[3:])
    assert all(len(trial.errors) == 2 and max(trial.errors) < 1e-5 for trial in trials[:3])


def test_inputs_take_turns_out_of_cache(clock):
    tune(ATTEND, CASE, CONFIGS, calls=3, turns=2, cold=10**5)
    size = sum(x.nbytes for x in draw(jax.random.key(0)))
    for inputs in clock:
        assert len(inputs) * size >= 10**5
        assert len({float(q[0, 0, 0, 0]) for q, *_ in inputs}) == len(inputs)
    with pytest.raises(ValueError, match=r"need \d+ sets to take turns out of cache, expected 4096"):
        draw_cold(CASE, 3, cold=10**9)


def test_a_gpu_needs_no_more_inputs_than_calls(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(draw_cold(CASE, 3, cold=10**9)) == 3
    size = sum(x.nbytes for x in draw(jax.random.key(0)))
    assert len(draw_cold(CASE, 9, cold=3 * size + 1)) == 4


def test_a_config_that_goes_wrong_once_it_is_timed_is_refused(monkeypatch):
    """As a race between threads may, which a first call need not show."""
    calls = []

    def wrong_later(config, q, k, v, held):
        def host(out):
            calls.append(config)
            return np.asarray(out) * (1.0 if calls.count(Block(96)) <= 2 or config != Block(96) else 1.5)

        out, lse = blocked(config, q, k, v, held)
        return jax.pure_callback(host, jax.ShapeDtypeStruct(out.shape, out.dtype), out), lse

    monkeypatch.setattr(module, "microseconds", lambda call, inputs, calls: [1.0])
    operation = Operation("blocks", wrong_later, ATTEND.reference, ATTEND.far, held_slots)
    good, bad = tune(operation, CASE, (Block(96), Block(32)), calls=1, turns=1, cold=10**5)
    assert (good.config, bad.config) == (Block(32), Block(96)) and "got 0.5" in bad.refused


def test_it_runs_by_the_clock():
    told = []
    trials = tune(ATTEND, CASE, CONFIGS[2:], calls=1, turns=1, cold=1, tell=lambda doing, done: told.append(done))
    row = row_of("blocks", CASE, trials, bound_us=0.5, date="today")
    assert row["us"] == trials[0].median > 0 and row["share"] == 0.5 / row["us"]
    assert row["config"] == {"size": trials[0].config.size, "whole": True}
    assert (row["tried"], row["refused"], row["date"]) == (3, 1, "today")
    assert row["range"][0] <= row["us"] <= row["range"][1]
    assert (row["operation"], row["exact"], row["sizes"]) == ("blocks", CASE.exact, CASE.sizes)
    assert told == sorted(told) and min(told) >= 0 and max(told) < 1


def test_all_refused_is_an_error():
    trials = tune(ATTEND, CASE, (Block(50),), calls=1, turns=1, cold=1)
    with pytest.raises(ValueError, match="no config for .*expected a size that divides"):
        row_of("blocks", CASE, trials, bound_us=1.0)
    with pytest.raises(ValueError, match="got 0, 1 and 1"):
        tune(ATTEND, CASE, (), calls=1, turns=1)


@pytest.mark.parametrize(
    ("got", "error"),
    [
        ([[3.0, 4.0], [0.0, 0.0]], 0.0),
        ([[3.0, 4.5], [0.0, 0.0]], 0.1),
        ([[3.0, jnp.nan], [0.0, 0.0]], jnp.inf),
        ([[3.0, jnp.inf], [0.0, 0.0]], jnp.inf),
        ([[3.0, 4.0], [1e-9, 0.0]], jnp.inf),
    ],
)
def test_the_error_is_of_the_worst_row(got, error):
    assert row_errors(jnp.array(got), jnp.array([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx((error,))


def test_infinities_must_be_where_they_should():
    want = (jnp.array([-jnp.inf, 2.0]), jnp.float32(1.0))
    assert row_errors(want, want) == (0.0, 0.0)
    assert row_errors((jnp.array([0.0, 2.0]), jnp.float32(1.0)), want) == (jnp.inf, 0.0)
    assert row_errors((jnp.array([jnp.inf, 2.0]), jnp.float32(1.0)), want) == (jnp.inf, 0.0)
    with pytest.raises(ValueError, match="of shape"):
        row_errors((jnp.zeros(3), jnp.float32(1.0)), want)
    with pytest.raises(ValueError, match="result like"):
        row_errors(want[0], want)


def test_a_trial_that_was_not_timed_is_last():
    assert Trial(Block(1)).median == float("inf")
