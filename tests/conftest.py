"""Strict JAX for every test: no silent promotion, no reused key."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session")
def smollm2():
    """The real model, fetched once: (model, params, tokenizer)."""
    import kvjax

    return kvjax.load("smollm2")
