"""Bits by measured sensitivity, on a model small enough to measure everything."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Quantized, allocate_bits, bit_problem
from kvjax.cache.allocation import exact
from tests.tiny import prompts, tiny

STRATEGY = Quantized(group=8, residual=8)


@pytest.fixture(scope="module")
def measured():
    model, params = tiny()
    sample = prompts(0, 2, 64)
    most = kvjax.nbytes(replace(STRATEGY, bits=8).shapes(model, batch=1, capacity=128))
    told = []
    problem = bit_problem(model, params, sample, most, capacity=128, strategy=STRATEGY, progress=told.append)
    return model, params, sample, problem, told


def test_more_bits_cost_more_bytes_and_lose_less(measured):
    *_, problem, _ = measured
    assert problem.groups == ("layer 0 keys", "layer 0 values", "layer 1 keys", "layer 1 values")
    assert problem.options == (2, 3, 4, 5, 6, 8)
    assert (np.diff(problem.bytes) > 0).all()
    assert (problem.cost[:, 0] > 2 * problem.cost[:, 2]).all() and (problem.cost[:, 2] > 2 * problem.cost[:, 5]).all()


def test_a_cost_is_what_a_cache_so_coded_loses(measured):
    """Two bits for one buffer and eight for the others, decoded through the real cache."""
    model, params, sample, problem, _ = measured
    for group in range(4):
        bits = [8] * 4
        bits[group] = 2
        coded = replace(STRATEGY, bits=tuple(bits[::2]), value_bits=tuple(bits[1::2]))
        logits = []
        for strategy in (kvjax.cache.Dense(), coded):
            cache = strategy.init(model, batch=2, capacity=64)
            _, cache = kvjax.prefill(model, params, cache, sample[:, :32])
            logits.append(model.apply({"params": params}, sample[:, 32:], None, cache)[0])
        full, ours = (jax.nn.log_softmax(x) for x in logits)
        loss = (np.exp(full) * (full - ours)).sum(-1).mean()
        others = problem.cost[:, -1].sum() - problem.cost[group, -1]  # eight bits in layer 0 show in layer 1
        np.testing.assert_allclose(problem.cost[group, 0] + others, loss, rtol=0.05)


def test_progress_reaches_the_end(measured):
    *_, told = measured
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 24


def test_bits_go_where_they_matter_and_fit(measured):
    model, params, sample, problem, _ = measured
    even = replace(STRATEGY, bits=4)
    room = kvjax.nbytes(even.shapes(model, batch=1, capacity=128))
    chosen = allocate_bits(model, params, sample, room, capacity=128, strategy=STRATEGY)
    assert kvjax.nbytes(chosen.shapes(model, batch=1, capacity=128)) <= room
    assert chosen.bits[0] > chosen.bits[1]  # noise in the first layer passes through the second too
    tight = replace(
        problem,
        budget=problem.budget - kvjax.nbytes(replace(STRATEGY, bits=8).shapes(model, batch=1, capacity=128)) + room,
    )
    assert problem.judge(exact(tight))[0] < problem.judge(np.full(4, 2))[0]


def test_what_cannot_be_measured_is_refused(measured):
    model, params, sample, *_ = measured
    with pytest.raises(ValueError, match="`bytes` must be at least .* what 2 bits need, got 100"):
        bit_problem(model, params, sample, 100, capacity=128, strategy=STRATEGY)
    with pytest.raises(ValueError, match="`sample` must be at least 40 tokens wide, .* got 30"):
        bit_problem(model, params, sample[:, :30], 10**6, capacity=128, strategy=STRATEGY)
    with pytest.raises(ValueError, match="`capacity` must leave something to code .* got 16"):
        bit_problem(model, params, sample, 10**6, capacity=16, strategy=STRATEGY)
    with pytest.raises(ValueError, match="`solver` must be one of greedy, exact, got 'quick'"):
        allocate_bits(model, params, sample, 10**6, capacity=128, solver="quick")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": np.zeros(64, int)}, r"`sample` must be token ids \[rows, width\], got int64 \(64,\)"),
        ({"sample": np.zeros((2, 64))}, r"`sample` must be token ids \[rows, width\], got float64 \(2, 64\)"),
        ({"sample": np.full((2, 64), 61)}, r"`sample` must be token ids in \[0, 61\), got 61 to 61"),
        ({"sample": np.full((2, 64), -1)}, r"`sample` must be token ids in \[0, 61\), got -1 to -1"),
        ({"strategy": Dense()}, r"`strategy` must be Quantized, whose bits are chosen, got Dense\("),
    ],
)
@pytest.mark.parametrize("measure", [allocate_bits, bit_problem])
def test_what_is_no_text_or_has_no_bits_is_refused(measure, change, words, unchecked):
    model, params = tiny()
    given = {"sample": prompts(0, 2, 64), "bytes": 10**6, "capacity": 128} | change
    with pytest.raises(ValueError, match=f"bit_problem: {words}"):
        measure(model, params, **given)
