"""Sizes of meshes, the order of fused kernels, and pages by turns: what needs no second device."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.accelerate import Layout, gather_params, layout_of
from kvjax.accelerate.axes import axes_of, joined, spec_of, split
from kvjax.accelerate.context import collected, deal
from kvjax.accelerate.params import fused_order
from kvjax.cache import STRATEGIES, Dense, Evicting, Quantized, Ring
from kvjax.cache.dense import DenseLayer
from kvjax.mesh import cut
from kvjax.pytree import pytree
from tests.accelerate.shared import model_of


def test_a_mesh_has_the_layout_it_was_made_of():
    mesh = Layout().mesh()
    assert mesh.axis_names == ("data", "context", "heads")
    assert layout_of(mesh) == Layout()


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_sizes_are_whole_numbers(size, unchecked):
    with pytest.raises(ValueError, match=f"Layout: `heads` must be a whole number.*got {size!r}"):
        Layout(heads=size)


def test_too_few_devices_and_sizes_that_do_not_divide():
    many = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=f"needs {many} devices, got {many - 1}"):
        Layout(data=many).mesh()
    with pytest.raises(ValueError, match="needs 1 devices, got 2"):
        Layout().mesh(jax.devices()[:1] * 2)
    config = model_of()[0].config
    with pytest.raises(ValueError, match="`heads` must divide the model's kv_heads, 4, got 3"):
        Layout(heads=3).check(config)
    with pytest.raises(ValueError, match="`heads` must divide the model's intermediate, 64, got 3"):
        Layout(heads=3).check(replace(config, heads=9, kv_heads=3))
    with pytest.raises(ValueError, match="`data` must divide the batch, 3 rows, got 2"):
        Layout(data=2).check(config, batch=3)


@settings(deadline=None, max_examples=12)
@given(shards=st.sampled_from([1, 2, 4]), q=st.integers(1, 3), kv=st.integers(1, 3))
def test_cut_gives_the_parts_of_a_fused_product_in_order(shards, q, kv):
    sizes = (shards * q, shards * kv, shards * kv)
    fused = jnp.arange(sum(sizes), dtype=jnp.float32)
    parts = cut(fused[fused_order(sizes, shards)], sizes, shards)
    np.testing.assert_array_equal(jnp.concatenate(parts), fused)


@settings(deadline=None, max_examples=12)
@given(slots=st.integers(1, 200), devices=st.integers(1, 5), seed=st.integers(0, 9))
def test_dealt_pages_are_collected_in_order(slots, devices, seed):
    k = jax.random.normal(jax.random.key(seed), (2, slots, 3))
    layer = DenseLayer(k, k + 1, jnp.array([1]))
    dealt = deal(layer, devices)
    assert dealt.limit == slots and dealt.k.shape[1] % (8 * devices) == 0
    assert dealt.k.shape[1] < slots + 64 * devices
    back = collected(dealt)
    np.testing.assert_array_equal(back.k, layer.k)
    np.testing.assert_array_equal(back.v, layer.v)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "shared"])
def test_every_array_of_every_strategy_declares_its_axes(name):
    """As many names as dimensions; what has rows lies along the heads, once they are an axis of their own."""
    small = {"evicting": Evicting(9, sinks=1, recent=3), "quantized": Quantized(8, residual=8), "ring": Ring(window=6)}
    strategy = small[name] if name in small else STRATEGIES[name]()
    for layer in strategy.init(model_of()[0], batch=3, capacity=64).layers:
        names = axes_of(layer)
        assert [len(each) for each in names] == [x.ndim for x in jax.tree.leaves(layer)]
        halves = split(layer, 3)
        for x, each in zip(jax.tree.leaves(halves), names, strict=True):
            for size, axis in zip(x.shape, spec_of(each), strict=False):
                assert size == {"data": 3, "heads": 4}.get(axis, size) or each == ("pages", "page", "kv_size")
        jax.tree.map(np.testing.assert_array_equal, joined(halves, 1), layer)


def test_an_array_without_names_is_refused():
    @pytree
    class Bare:
        k: jax.Array

    with pytest.raises(ValueError, match=re.escape("Bare.k must declare its axes")):
        axes_of(Bare(jnp.zeros(3)))


def test_only_parameters_of_a_mesh_are_gathered(unchecked):
    with pytest.raises(ValueError, match="gather_params: `model` must be the one that `shard` gave"):
        gather_params(model_of()[1], model_of()[0])
    assert Dense().init(model_of()[0], batch=1, capacity=4).strategy == Dense()
