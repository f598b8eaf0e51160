import pytest

from kvjax.cache.prefix.features import OFFSETS, SIZES, WEIGHTS, Turn, levels


@pytest.mark.parametrize("number", [1, 2, 5, 8, 9, 1000])
@pytest.mark.parametrize("tokens", [1, 64, 700, 10**9])
@pytest.mark.parametrize("answer", [None, 0, 1, 300, 10**9])
@pytest.mark.parametrize(("gap", "growth"), [(None, 0), (0.0, -5), (1e9, 10**6)])
def test_every_turn_has_a_level_of_each_feature(number, tokens, answer, gap, growth):
    chosen = levels(Turn(number, tokens, answer, gap, growth))
    assert all(low <= level < low + size for low, level, size in zip(OFFSETS, chosen, SIZES, strict=True))
    assert OFFSETS[-1] + SIZES[-1] == WEIGHTS


def test_levels_tell_what_matters_apart():
    base = Turn(2, 5000, 100, 30.0, 1)
    others = [
        Turn(1, 5000, 100),
        Turn(3, 5000, 100, 30.0, 1),
        Turn(2, 8000, 100, 30.0, 1),
        Turn(2, 5000, None, 30.0, 1),
        Turn(2, 5000, 100, 70.0, 1),
        Turn(2, 5000, 100, 30.0, 20),
    ]
    assert len({levels(turn) for turn in [base, *others]}) == 7
