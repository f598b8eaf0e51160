"""Products with packed keys and values are those with what their codecs decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.folded import mix, scores
from kvjax.cache.packing import PLANES
from kvjax.cache.quantize import FORMS, Codec


@pytest.mark.parametrize(("bits", "group", "groups"), [*((bits, 16, 3) for bits in PLANES), (4, 8, 11)])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_codes_are_products_with_decoded_tokens(form, bits, group, groups):
    """Eleven groups of eight: more than a tile of values, and three over."""
    x, q, w = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, groups, group, 8), (2, 3, 8), (2, 3, group * groups)])
    )

    @jax.jit
    def both(x, q, w):
        k, v = (Codec(form, bits, group, 8, "float16", keys) for keys in (True, False))
        keys, values = k.encode(x), v.encode(x)
        by_group = w.reshape(2, 3, groups, group).swapaxes(2, 3)
        logits = scores(k, *keys, q).swapaxes(2, 3).reshape(2, 3, -1)
        wanted = jnp.einsum("rqd,rsd->rqs", q, k.decode(*keys)), jnp.einsum("rqs,rsd->rqd", w, v.decode(*values))
        return (logits, mix(v, *values, by_group)), wanted, k.decode(*keys) - v.decode(*values)

    got, wanted, difference = both(x, q, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, wanted)
    np.testing.assert_allclose(difference, 0, atol=1e-6)
