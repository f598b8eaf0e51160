"""The attention a slot receives, against a softmax in loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.received import received
from kernels.reference import Mask, attend
from tests.kernels.test_reference import MASKS, by_hand, inputs


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_received_is_the_weighed_sum_of_probabilities(mask):
    """Slot by slot, from the output of values that are one at that slot alone."""
    q, k, _, positions, slots = inputs(0, batch=3, kv_heads=1, heads=2, slots=9)
    weight = jnp.array([[1.0, 0.0, 0.5]]).repeat(3, 0)
    one_hot = np.broadcast_to(np.eye(9)[None], (3, 9, 9))
    lse = attend(q, k, k, positions, slots, mask)[1]
    got = received(q, k, positions, slots, lse, weight, mask)
    wide = np.pad(q, ((0, 0), (0, 0), (0, 0), (0, 1))), np.pad(k, ((0, 0), (0, 0), (0, 1)))
    chance = by_hand(*wide, one_hot, positions, slots, mask)[0]
    np.testing.assert_allclose(got, np.einsum("rqhs,rq->rs", chance, weight), atol=2e-6)


def test_many_queries_go_in_tiles():
    q, k, v, positions, slots = inputs(1, batch=2, kv_heads=1, heads=2, width=300, slots=300)
    lse = attend(q, k, v, positions, slots, Mask(0.3))[1]
    weight = jnp.asarray(np.random.default_rng(0).random((2, 300)), jnp.float32)
    cuts = [slice(i, i + 100) for i in (0, 100, 200)]
    parts = [received(q[:, i], k, positions[:, i], slots, lse[:, i], weight[:, i], Mask(0.3)) for i in cuts]
    got = received(q, k, positions, slots, lse, weight, Mask(0.3))
    np.testing.assert_allclose(got, sum(parts), atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 2 * weight.sum(1), rtol=1e-5)


def test_a_query_of_no_weight_may_hold_anything():
    q, k, v, positions, slots = inputs(2, batch=1, kv_heads=1, heads=1)
    lse = attend(q, k, v, positions, slots, Mask(0.3))[1]
    weight = jnp.array([[1.0, 1.0, 0.0]])
    wanted = received(q, k, positions, slots, lse, weight, Mask(0.3))
    got = received(q.at[:, 2].set(jnp.nan), k, positions, slots, lse.at[:, 2].set(jnp.nan), weight, Mask(0.3))
    np.testing.assert_array_equal(got, wanted)
