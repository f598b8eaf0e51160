"""The laws that every attention kernel must keep, on the reference itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.reference import Mask, attend, merge


def inputs(seed: int, batch=2, width=3, heads=4, kv_heads=2, slots=16, dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (batch, width, heads, dim), dtype)
    k = jax.random.normal(keys[1], (batch * kv_heads, slots, dim), dtype)
    v = jax.random.normal(keys[2], (batch * kv_heads, slots, dim), dtype)
    positions = jnp.arange(slots - width, slots)[None].repeat(batch, 0)
    return q, k, v, positions, jnp.arange(slots)[None].repeat(batch, 0)


def by_hand(q, k, v, positions, slots, mask):
    """A softmax a query, in float64 and in loops."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, width, heads, dim = q.shape
    group = heads // (k.shape[0] // batch)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, w, h in np.ndindex(batch, width, heads):
        row = (b * heads + h) // group
        at = int(positions[b, w])
        see = [
            i
            for i, s in enumerate(np.asarray(slots[b]))
            if 0 <= s <= at and (mask.window is None or s > at - mask.window or s < mask.sinks)
        ]
        if not see:
            continue
        logits = k[row, see] @ q[b, w, h] * mask.scale
        if mask.softcap is not None:
            logits = mask.softcap * np.tanh(logits / mask.softcap)
        lse[b, w, h] = np.log(np.exp(logits).sum())
        out[b, w, h] = np.exp(logits - lse[b, w, h]) @ v[row, see]
    return out, lse


MASKS = [
    Mask(0.4),
    Mask(0.4, window=5),
    Mask(0.4, window=3, sinks=2),
    Mask(0.4, softcap=0.7),
    Mask(0.4, window=4, sinks=1, softcap=2.0),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_is_softmax_over_what_is_visible(mask, kv_heads):
    q, k, v, positions, slots = inputs(0, kv_heads=kv_heads)
    slots = slots.at[:, 4].set(-1).at[0].set(jnp.flip(slots[0]))  # a hole, and an order that is not by position
    chex.assert_trees_all_close(
        attend(q, k, v, positions, slots, mask), by_hand(q, k, v, positions, slots, mask), atol=2e-6
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("tile", "block"), [(128, 1), (4, 7), (9, 16), (2, 5)])
def test_tiles_and_blocks_change_nothing(mask, tile, block, monkeypatch):
    args = inputs(1, width=9)
    whole = attend(*args, mask)
    monkeypatch.setattr(reference, "TILE", tile)
    monkeypatch.setattr(reference, "BLOCK", block)
    monkeypatch.setattr(reference, "FEW", 0)
    chex.assert_trees_all_close(attend(*args, mask), whole, atol=2e-6)


@pytest.mark.parametrize("mask", [MASKS[0], MASKS[4]], ids=str)
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
def test_a_tile_stops_after_the_last_slot_it_may_see(mask, first, turned, monkeypatch):
    q, k, v, _, slots = inputs(4, width=9)
    positions = jnp.arange(first, first + 9)[None].repeat(2, 0)
    if turned:
        slots = jnp.roll(slots, 5, axis=1)
    whole = attend(q, k, v, positions, slots, mask)
    monkeypatch.setattr(reference, "TILE", 2)
    chex.assert_trees_all_close(attend(q, k, v, positions, slots, mask), whole, atol=2e-6)
    if not turned:  # what lies past the last visible slot, rounded up, is never read
        edge = min(16, first + 10)
        late = k.at[:, edge:].set(jnp.nan)
        chex.assert_trees_all_close(attend(q, late, v, positions, slots, mask), whole, atol=2e-6)


@jax.jit
def attend_plainly(q, k, v, positions, slots):
    return attend(q, k, v, positions, slots, Mask(0.3))


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 16), seed=st.integers(0, 2**31 - 1))
def test_merging_two_parts_is_attending_to_all(cut, seed):
    *qkv, positions, slots = inputs(seed)
    first = slots < cut  # cut = 0 and 16 leave one side empty: its lse is -inf
    left = attend_plainly(*qkv, positions, jnp.where(first, slots, -1))
    right = attend_plainly(*qkv, positions, jnp.where(first, -1, slots))
    chex.assert_trees_all_close(merge(left, right), attend_plainly(*qkv, positions, slots), atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity():
    q, k, v, positions, slots = inputs(2)
    out, lse = attend(q, k, v, positions, jnp.full_like(slots, -1), Mask(1.0))
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()
    nothing = merge((out, lse), (out, lse))
    assert (nothing[0] == 0).all()
    assert jnp.isneginf(nothing[1]).all()


def test_gradients_pass_blocks_and_empty_slots(monkeypatch):
    q, k, v, positions, slots = inputs(3, width=9)
    slots = slots.at[:, 12:].set(-1)

    def loss(q, k, v):
        out, lse = attend(q, k, v, positions, slots, Mask(0.4))
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    whole = jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(reference, "TILE", 4)
    monkeypatch.setattr(reference, "BLOCK", 5)
    monkeypatch.setattr(reference, "FEW", 0)
    blocks = jax.grad(loss, (0, 1, 2))(q, k, v)
    chex.assert_trees_all_close(whole, blocks, atol=5e-6)
    assert (whole[1][:, 12:] == 0).all()
    assert all(jnp.isfinite(x).all() for x in whole)


def test_heads_that_do_not_group_are_refused():
    q, k, v, positions, slots = inputs(4, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="heads"):
        attend(q, k, v, positions, slots, Mask(1.0))
