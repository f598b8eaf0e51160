"""Where tests of kernels can run."""

import jax
import pytest

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the interpreter of Mosaic GPU kernels came with JAX 0.11"
)
on_hopper = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an H100 or H200")
