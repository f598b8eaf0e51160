"""Calls are timed on inputs that take turns, and a GPU's by the stamps of all their kernels."""

from itertools import count
from types import SimpleNamespace

import jax
import pytest

from kvjax.accelerate import timing
from kvjax.accelerate.timing import by_clock, by_cupti, cold_bytes, microseconds, summed


def test_a_call_is_all_its_kernels():
    assert summed([0.001, 0.002, 0.003, 0.004], 2) == pytest.approx([3.0, 7.0])
    with pytest.raises(RuntimeError, match="2 calls ran 3 kernels"):
        summed([0.001] * 3, 2)


@pytest.mark.parametrize(("seconds", "each"), [(timing.LEAST / 4, 4), (2 * timing.LEAST, 1)])
def test_short_calls_are_means_over_several_and_inputs_take_turns(monkeypatch, seconds, each):
    now, seen = [0.0], []

    def call(x):
        seen.append(x)
        now[0] += seconds * (1 + (len(seen) > 4))  # the fifth and later take twice as long
        return x

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    us = by_clock(call, [(0,), (1,), (2,)], calls=2)
    assert seen == [0, 1, 2] + [i % 3 for i in range(1 + 2 * each)]
    assert us == pytest.approx([2e6 * seconds] * 2)


def test_a_gpu_is_timed_after_its_cache_was_emptied(monkeypatch):
    order, stamps = [], count(1.0)
    fake = SimpleNamespace(
        _cupti_init=lambda: order.append("init"),
        _cupti_get_timings=lambda finalize: [("kernel", next(stamps)) for _ in range(6)],
    )
    monkeypatch.setattr(jax._src.lib, "mosaic_gpu", SimpleNamespace(_mosaic_gpu_ext=fake), raising=False)
    monkeypatch.setattr(timing, "evict", lambda: order.append("evict"))
    seen = []

    def call(x):
        order.append("call")
        seen.append(x)
        return x

    us = by_cupti(call, [(0,), (1,)], calls=3)
    assert order == ["call", "call", "evict", "init", "call", "call", "call"]
    assert seen == [0, 1, 0, 1, 0] and us == [3e3, 7e3, 11e3]


def test_what_leaves_nothing_in_cache():
    assert cold_bytes(50, "gpu") == 300 and cold_bytes(50, "cpu") == 100
    assert cold_bytes(None, "gpu") == timing.COLD and cold_bytes(None, "cpu") > 0


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="at least 1 call, got 0 and 3"):
        microseconds(abs, [], 3)
    with pytest.raises(ValueError, match="got 1 and 0"):
        microseconds(abs, [(1,)], 0)


def test_evicting_reads_more_than_the_cache_holds(monkeypatch):
    sizes = []
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4000)
    monkeypatch.setattr(timing, "_total", lambda x: sizes.append(x.nbytes))
    timing.evict()
    assert sizes == [cold_bytes(4000, jax.default_backend())]
