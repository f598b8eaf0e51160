"""Rates count what was moved or computed, whatever time it took."""

import pytest

from kvjax.accelerate import rates


def test_bytes_moved_are_counted_both_ways_but_for_a_read(monkeypatch):
    monkeypatch.setattr(rates, "microseconds", lambda call, inputs, calls: [1e6] * calls)
    monkeypatch.setattr(rates, "_clocked", lambda call, x, calls: 1.0)
    assert rates.bandwidth("read", "cpu", 2**20) == 2**20
    assert {rates.bandwidth(form, "cpu", 2**20) for form in ("add", "copy", "update")} == {2**21}
    with pytest.raises(ValueError, match="must be one of read, add, copy, update, got 'write'"):
        rates.bandwidth("write", "cpu")


def test_a_product_counts_two_operations_a_pair(monkeypatch):
    monkeypatch.setattr(rates, "microseconds", lambda call, inputs, calls: [3e6, 1e6, 2e6])
    assert rates.product_rate("cpu", "float32", 8) == 2 * 8**3
