"""Two processes that each have two devices, joined by `jax.distributed` and gloo, decode what one device does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense
from tests.accelerate.shared import BATCH, LENGTHS, TOKENS, model_of

CODE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
import kvjax
from kvjax.accelerate import Layout, shard
from kvjax.cache import Dense
from tests.accelerate.shared import BATCH, LENGTHS, TOKENS, model_of
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
layout = Layout(**json.loads(sys.argv[3]))
model, params = shard(*model_of(), layout.mesh())
cache = Dense().init(model, batch=BATCH, capacity=32)
assert not cache.layers[0].layer.k.is_fully_addressable
print(json.dumps(kvjax.generate(model, params, cache, TOKENS, LENGTHS, max_new=5).tokens.tolist()))
"""


@pytest.mark.parametrize(
    "layout", [{"data": 2, "heads": 2}, pytest.param({"context": 4}, marks=pytest.mark.slow)], ids=str
)
def test_two_processes_give_the_tokens_of_one_device(layout):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast}
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, port, str(i), json.dumps(layout)],
            cwd=root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(error for _, error in said)
    model, params = model_of()
    cache = Dense().init(model, batch=BATCH, capacity=32)
    expected = np.asarray(kvjax.generate(model, params, cache, TOKENS, LENGTHS, max_new=5).tokens).tolist()
    for out, _ in said:
        assert json.loads(out.splitlines()[-1]) == expected
