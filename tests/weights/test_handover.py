"""A cache that goes from one process to another, and is kept there in another way."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Shared
from tests.tiny import prompts, tiny

TOKENS, LENGTHS = prompts(5, 3, 13), [13, 4, 9]
NEW = 8


def held(strategy, model=None):
    """A cache with all but the last token of each prompt, and those."""
    net, params = tiny()
    cache = strategy.init(net, batch=3, capacity=32)
    first = [row[: n - 1].tolist() for row, n in zip(np.asarray(TOKENS), LENGTHS, strict=True)]
    _, cache = kvjax.prefill(net, params, cache, first)
    return cache, [[int(TOKENS[i, n - 1])] for i, n in enumerate(LENGTHS)]


def wanted():
    cache, last = held(Dense())
    model, params = tiny()
    return np.asarray(kvjax.generate(model, params, cache, last, max_new=NEW).tokens)


@pytest.mark.parametrize("source", [Dense(), Ring(), Paged(page=4), Quantized(8, residual=8)], ids=str)
@pytest.mark.parametrize("target", [Dense(), Ring(), Paged(page=8, pool=12), Quantized(8, residual=4)], ids=str)
def test_kept_in_another_way(source, target, tmp_path):
    model, params = tiny()
    cache, last = held(source)
    kvjax.export_cache(tmp_path / "cache", cache)
    again = kvjax.import_cache(tmp_path / "cache", model, target, capacity=40)
    assert again.strategy == target and again.capacity == 40
    np.testing.assert_array_equal(again.length, cache.length)
    out = kvjax.generate(model, params, again, last, max_new=NEW)
    np.testing.assert_array_equal(out.tokens, wanted())


def test_from_process_to_process(tmp_path):
    """The other process never sees the prompt."""
    cache, last = held(Dense())
    kvjax.export_cache(tmp_path / "cache", cache)
    code = f"""
import jax, kvjax
from kvjax.cache import Paged
from tests.tiny import tiny
model, params = tiny()
cache = kvjax.import_cache({str(tmp_path / "cache")!r}, model, Paged(page=4), capacity=32)
print(kvjax.generate(model, params, cache, {last}, max_new={NEW}).tokens.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(done.stdout) == wanted().tolist()


def test_what_is_handed_over_is_as_long_as_what_is_held(tmp_path):
    model, params = tiny()
    cache = Dense().init(model, batch=1, capacity=4096)
    _, cache = kvjax.prefill(model, params, cache, [[1, 2, 3]])
    kvjax.export_cache(tmp_path / "cache", cache)
    size = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert size < kvjax.nbytes(cache) / 20
    assert kvjax.decode_step(model, params, cache, jnp.array([4]))[1].length.tolist() == [4]  # it stays valid


def test_another_precision_and_device(tmp_path):
    model, params = tiny()
    cache, last = held(Dense())
    kvjax.export_cache(tmp_path / "cache", cache)
    again = kvjax.import_cache(tmp_path / "cache", model, Dense("bfloat16"), capacity=32, device=jax.devices()[0])
    assert again.layers[0].k.dtype == jnp.bfloat16 and again.layers[0].k.devices() == {jax.devices()[0]}
    np.testing.assert_allclose(
        again.layers[0].k[:, :3].astype(jnp.float32), cache.layers[0].k[:, :3], rtol=1e-2, atol=1e-2
    )
    kvjax.generate(model, params, again, last, max_new=2)


def test_another_device_of_two(tmp_path):
    """Decoded on a second device, which the default one is not."""
    cache, last = held(Dense())
    kvjax.export_cache(tmp_path / "cache", cache)
    code = f"""
import jax, kvjax
from kvjax.cache import Paged
from tests.tiny import tiny
one, two = jax.devices()
model, params = tiny()
cache = kvjax.import_cache({str(tmp_path / "cache")!r}, model, Paged(page=4), capacity=32, device=two)
assert all(x.devices() == {{two}} for x in jax.tree.leaves(cache))
with jax.default_device(two):
    out = kvjax.generate(model, jax.device_put(params, two), cache, {last}, max_new={NEW})
assert out.tokens.devices() == {{two}}
print(out.tokens.tolist())
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == wanted().tolist()


@pytest.mark.parametrize("strategy", [Ring(window=16), Evicting(64)], ids=str)
def test_one_that_has_dropped_nothing_yet_holds_all(strategy, tmp_path):
    model, params = tiny()
    cache, last = held(strategy)
    kvjax.export_cache(tmp_path / "cache", cache)
    again = kvjax.import_cache(tmp_path / "cache", model, capacity=32)
    np.testing.assert_array_equal(kvjax.generate(model, params, again, last, max_new=NEW).tokens, wanted())


def test_an_empty_cache(tmp_path):
    model, _ = tiny()
    kvjax.export_cache(tmp_path / "cache", Dense().init(model, batch=2, capacity=8))
    assert kvjax.import_cache(tmp_path / "cache", model, capacity=8).length.tolist() == [0, 0]


def test_what_cannot_be_handed_over(tmp_path, unchecked):
    model, _ = tiny()
    lossy, _ = held(Ring(window=6))
    with pytest.raises(ValueError, match="has dropped some"):
        kvjax.export_cache(tmp_path / "cache", lossy)
    with pytest.raises(ValueError, match="`cache` must be what a strategy's `init` makes, got int"):
        kvjax.export_cache(tmp_path / "cache", 3)
    with pytest.raises(FileNotFoundError, match="no hand-over at"):
        kvjax.import_cache(tmp_path / "none", model, capacity=8)
    kvjax.export_cache(tmp_path / "cache", held(Dense())[0])
    with pytest.raises(ValueError, match=r"rows need 12 slots a row, but the cache's capacity is 8: make `capacity`"):
        kvjax.import_cache(tmp_path / "cache", model, capacity=8)
    with pytest.raises(ValueError, match="rows need 6 pages of 4 tokens, but 5 of the pool's 5 are free"):
        kvjax.import_cache(tmp_path / "cache", model, Paged(page=4, pool=5), capacity=32)
    with pytest.raises(ValueError, match="keeps rows apart"):
        kvjax.import_cache(tmp_path / "cache", model, Shared(), capacity=32)
    with pytest.raises(ValueError, match="queries"):
        kvjax.import_cache(tmp_path / "cache", model, Evicting(8, "snapkv", sinks=1, recent=2), capacity=32)
    other = kvjax.Transformer(replace(model.config, vocab=60))
    with pytest.raises(ValueError, match="for another model: its vocab differ"):
        kvjax.import_cache(tmp_path / "cache", other, capacity=32)
    for text in ('{"format": "x"}', '{"format": "kvjax-handover-1"}'):
        (tmp_path / "cache" / "handover.json").write_text(text)
        with pytest.raises(ValueError, match="is not of format kvjax-handover-1, or not whole"):
            kvjax.import_cache(tmp_path / "cache", model, capacity=32)
