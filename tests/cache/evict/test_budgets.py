"""Splitting a budget over layers and heads."""

import numpy as np
import pytest

from kvjax.cache import Evicting
from kvjax.cache.evict.budgets import adaptive, pyramid
from tests.tiny import tiny


@pytest.mark.parametrize(("budget", "layers"), [(100, 1), (100, 30), (37, 7)])
def test_a_pyramid_falls_and_keeps_the_sum(budget, layers):
    each = pyramid(budget, layers)
    assert sum(each) == budget * layers
    assert list(each) == sorted(each, reverse=True)
    assert layers == 1 or abs(each[0] - 1.5 * budget) <= 1


def test_a_pyramid_gives_no_layer_too_little():
    assert pyramid(10, 3, least=8) == (15, 10, 8)


def test_entropy_decides_in_proportion_to_the_tokens_it_spreads_over():
    nats = np.log([[1.0, 3.0], [2.0, 2.0]])
    assert adaptive(nats, 100, least=20) == ((60, 140), (100, 100))


@pytest.mark.parametrize(
    ("nats", "budget", "words"),
    [(np.ones(2), 9, r"\[layers, kv_heads\]"), ([[np.nan]], 9, "finite"), ([[1.0]], 1, "at least 4")],
)
def test_impossible_measures_are_refused(nats, budget, words):
    with pytest.raises(ValueError, match=words):
        adaptive(nats, budget, least=4)


def test_layers_get_slots_of_their_own():
    model, _ = tiny()
    slots = lambda strategy: [x.positions.shape for x in strategy.shapes(model, batch=3, capacity=64).layers]  # noqa: E731
    assert slots(Evicting(20, sinks=2, recent=4, split="pyramid")) == [(6, 30), (6, 10)]
    assert slots(Evicting(((9, 11), 99), sinks=2, recent=4)) == [(6, 11), (6, 64)]
