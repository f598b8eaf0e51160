import pytest

from kvjax.cache.prefix.forest import Forest, fell, leaf, plant


def test_a_candidate_that_is_continued_gives_the_end_of_its_continuation():
    forest = Forest()
    plant(forest, (1, 2, 3))
    plant(forest, (1, 4))
    assert forest.parent == {1: -1, 2: 1, 3: 2, 4: 1}
    assert leaf(forest, [1], frozenset()) == 3
    assert leaf(forest, [2, 4], frozenset({1, 2})) == 4
    fell(forest, 3)
    fell(forest, 2)
    assert leaf(forest, [1], frozenset()) == 4
    fell(forest, 4)
    assert forest == Forest({1: -1}) and leaf(forest, [1], frozenset()) == 1
    with pytest.raises(ValueError, match="that is not `pinned`, got none"):
        leaf(forest, [1], frozenset({1}))
