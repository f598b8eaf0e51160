"""Strict JAX for every test: no silent promotion, no reused key, no program from an earlier run."""

import os
import signal
from pathlib import Path

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
os.environ["KVJAX_COMPILE_CACHE"] = "0"
os.environ.setdefault(  # tests compile much and compute little
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 30_000
"""Of memory, in this process. Linux allows 65,530; compiled programs take a few each, and XLA crashes at the limit."""


@pytest.fixture(autouse=True)
def programs():
    """Those of earlier tests are dropped once there are too many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


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
