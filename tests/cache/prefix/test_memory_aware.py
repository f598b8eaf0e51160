import pytest

from kvjax.cache.prefix import Access, MemoryAware
from kvjax.cache.prefix.memory_aware import cost

LONG, SHORT = tuple(range(60)), (100, 101, 102)


def order(policy, long_bytes=1.0):
    state = policy.touch(policy.init(100), Access(LONG, 0.0, 1000, block_bytes=long_bytes))
    state = policy.touch(state, Access(SHORT, 0.0, 1000))
    left = []
    for _ in range(63):
        block, state = policy.victim(state)
        left.append(block)
    return left


def test_equally_likely_blocks_leave_by_what_they_cost_again():
    assert set(order(MemoryAware())[:4]) == {*SHORT, LONG[-1]}
    assert cost(64, 64.0) == 2 * cost(0, 64.0)


def test_large_blocks_leave_first():
    assert set(order(MemoryAware(), long_bytes=10.0)[:60]) == set(LONG)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`level` must be positive, got 0"):
        MemoryAware(level=0.0)
    with pytest.raises(ValueError, match="`remembered` must be at least 64"):
        MemoryAware(remembered=1)
    with pytest.raises(ValueError, match="`prior` must be one of"):
        MemoryAware(prior="no")
