"""Strict JAX for every test: no silent promotion, no reused key."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session")
def smollm2():
    """The real model, fetched once: (model, params, tokenizer)."""
    import kvjax

    return kvjax.load("smollm2")


@pytest.fixture
def unchecked():
    """Without the tests' runtime type checks, as users run it: our own errors must say what is wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
