"""These tests need eight devices before JAX starts; `tests/accelerate/test_devices.py` runs them in such a process."""

import os

import pytest

from kvjax.accelerate import Layout, shard
from tests.accelerate.shared import model_of

collect_ignore_glob = [] if "host_platform_device_count=8" in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]


@pytest.fixture(scope="session")
def sharded():
    """From a layout to the model and parameters on its mesh; None gives those of one device."""
    made = {}

    def of(layout: Layout | None, tied: bool = False, layers: int = 1):
        kind = layout, tied, layers
        if kind not in made:
            model, params = model_of(tied, layers)
            made[kind] = (model, params) if layout is None else shard(model, params, layout.mesh())
        return made[kind]

    return of
