"""Bits under a byte budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.allocation import SOLVERS, AllocationProblem, exact, greedy


def problem(seed, groups=4, options=3, share=0.5, forbid=False):
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.exponential(size=(groups, options)))[:, ::-1].copy()
    size = np.sort(rng.integers(1, 40, (groups, options)))
    allowed = rng.random((groups, options)) < 0.7 if forbid else np.ones((groups, options), bool)
    allowed[np.arange(groups), rng.integers(0, options, groups)] = True
    least = np.where(allowed, size, 10**6).min(1).sum()
    budget = int(least + share * (size.max(1).sum() - least))
    return AllocationProblem(tuple(map(str, range(groups))), (2, 4, 8)[:options], cost, size, budget, allowed)


def best(p):
    """By trying everything."""
    choices = [
        np.array(c)
        for c in itertools.product(*(np.flatnonzero(row) for row in p.may))
        if p.judge(np.array(c))[1] <= p.budget
    ]
    return min(p.judge(c)[0] for c in choices)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), forbid=st.booleans())
def test_exact_is_the_least_and_greedy_is_near(seed, share, forbid):
    p = problem(seed, share=share, forbid=forbid)
    least = best(p)
    for name, solve in SOLVERS.items():
        choice = solve(p)
        cost, size = p.judge(choice)
        assert size <= p.budget, name
        assert p.may[np.arange(4), choice].all(), name
        assert cost >= least - 1e-9, name
    assert p.judge(exact(p))[0] == pytest.approx(least)


def test_greedy_may_miss_what_exact_finds():
    p = AllocationProblem(("a", "b"), (0, 1), np.array([[10.0, 1.0], [6.0, 0.0]]), np.array([[0, 9], [0, 5]]), 9)
    assert p.judge(greedy(p)) == (10.0, 5)  # b saves 1.2 a byte, a only 1, and then there is no room for a
    assert p.judge(exact(p)) == (7.0, 9)


def test_a_bigger_budget_never_costs_more():
    costs = [p.judge(exact(p))[0] for p in (problem(3, share=share) for share in np.linspace(0, 1, 7))]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": 3}, "`budget` must be at least 4 bytes.*got 3"),
        (
            {"cost": np.ones((2, 3)), "bytes": np.ones((2, 3), int)},
            r"`cost` must be \(2, 2\), groups by options, got \(2, 3\)",
        ),
        ({"cost": np.full((2, 2), np.nan)}, "`cost` must be finite"),
        ({"allowed": np.array([[True, True], [False, False]])}, "`allowed` leaves no option for layer 1 keys"),
    ],
)
def test_what_makes_no_problem_is_refused(change, said):
    fields = {
        "groups": ("layer 0 keys", "layer 1 keys"),
        "options": (2, 4),
        "cost": np.ones((2, 2)),
        "bytes": np.array([[2, 4], [2, 4]]),
        "budget": 8,
    }
    with pytest.raises(ValueError, match=said):
        AllocationProblem(**fields | change)
