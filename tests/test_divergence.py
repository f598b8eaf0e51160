"""The divergence of next-token distributions, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.divergence import divergence


def test_it_is_the_sum_by_hand():
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]]), np.array([[0.25, 0.25, 0.5], [0.3, 0.5, 0.2]])
    wanted = [0.25 * np.log(2), 0.1 * np.log(1 / 3) + 0.9 * np.log(1.8)]
    got = divergence(jnp.log(p) + 3.0, jnp.log(q) - 1.0)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert jnp.isinf(divergence(jnp.log(q), jnp.log(p))[1])


def test_it_is_zero_for_the_same_and_least_there():
    logits = jax.random.normal(jax.random.key(0), (4, 50), jnp.bfloat16)
    assert divergence(logits, logits).dtype == jnp.float32 and (divergence(logits, logits) == 0).all()
    masked = logits.at[:, 3].set(-jnp.inf)
    slope = jax.grad(lambda x: divergence(masked, x).sum())(masked)
    np.testing.assert_allclose(slope, jnp.zeros_like(slope), atol=1e-2)
