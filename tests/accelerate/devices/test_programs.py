"""What compiled programs send between devices, keep in place and compile again; and what is refused."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels import dispatch
from kvjax.accelerate import Layout, gather_params, shard, shard_cache
from kvjax.cache import Dense, Paged, Quantized, Ring, Shared
from kvjax.decode import begin, rules, state
from tests.accelerate.shared import BATCH, LENGTHS, TOKENS, model_of
from tests.compiles import Compiles
from tests.kernels.marks import interpreted

CAPACITY = 4096
COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
)


def collectives(text: str) -> list[tuple[str, int]]:
    """Each collective's name and the elements that it gives."""
    return [
        (name, int(np.prod([int(n) for n in shape.split(",") if n] or [1]))) for shape, name in COLLECTIVE.findall(text)
    ]


def program(name: str, model, params):
    cache = Dense().init(model, batch=BATCH, capacity=CAPACITY)
    token = jnp.zeros(BATCH, jnp.int32)
    if name == "decode_step":
        return kvjax.decode_step.lower(model, params, cache, token).compile(), cache
    settings = rules(kvjax.Sampling(), batch=BATCH, vocab=model.config.vocab, max_new=8)
    under_way = begin(cache, token, jnp.zeros((BATCH, model.config.vocab), bool), 8)
    return state._advance.lower(model, params, under_way, settings, jnp.int32(8)).compile(), cache


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_sums_twice_a_layer(sharded, tied):
    """Tensor parallel: no more than that, the embedding's sum and the logits; a fused kernel is cut where it should."""
    model, params = sharded(Layout(heads=4), tied, layers=2)
    text = program("decode_step", model, params)[0].as_text()
    c = model.config
    found = collectives(text)
    assert found.count(("all-reduce", BATCH * c.hidden)) == 2 * c.layers + 1
    assert found.count(("all-gather", BATCH * c.vocab)) == 1
    assert len(found) == 2 * c.layers + 2


def test_context_sends_results_once_a_layer(sharded):
    model, params = sharded(Layout(context=8), layers=2)
    c = model.config
    found = collectives(program("decode_step", model, params)[0].as_text())
    assert found == [("all-gather", 8 * BATCH * c.heads * (c.head_dim + 1))] * c.layers


@pytest.mark.parametrize("name", ["decode_step", "generate"])
@pytest.mark.parametrize("layout", [Layout(data=2, heads=4), Layout(data=2, context=2, heads=2)], ids=str)
def test_no_collective_of_the_cache_and_none_of_it_copied(sharded, layout, name):
    model, params = sharded(layout)
    compiled, cache = program(name, model, params)
    buffer = cache.layers[0].layer.k
    local = buffer.sharding.shard_shape(buffer.shape)
    assert np.prod(local) * layout.devices == buffer.size
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = collectives(text)
    assert found and max(size for _, size in found) < np.prod(local) / 8
    assert memory.alias_size_in_bytes >= 2 * model.config.layers * np.prod(local) * buffer.dtype.itemsize
    assert memory.temp_size_in_bytes < np.prod(local) * buffer.dtype.itemsize
    flat = (local[0] * local[1], *local[2:])
    for shape in (local, flat):
        assert not re.search(rf"= f32\[{','.join(map(str, shape))}\]\S* copy\(", text)


@interpreted
def test_a_gpu_runs_our_kernel_on_each_device_s_part(monkeypatch):
    """As far as a CPU can tell: in the program for a GPU the kernel's operands have the shapes of one device."""
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    model = kvjax.Transformer(replace(model_of()[0].config, head_dim=64), kvjax.Precision(*("bfloat16",) * 3))
    model, params = shard(model, kvjax.init_params(model, jax.random.key(0)), Layout(data=2, context=2, heads=2).mesh())
    cache = Dense().init(model, batch=BATCH, capacity=CAPACITY)
    traced = kvjax.decode_step.trace(model, params, cache, jnp.zeros(BATCH, jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (operands,) = re.findall(r"custom_call @mosaic_gpu.* : \(([^()]*)\) -> ", text)
    rows = BATCH // 2 * model.config.kv_heads // 2
    assert operands.count(f"tensor<{rows}x{CAPACITY // 2}x64xbf16>") == 2
    assert f"x{CAPACITY}x" not in operands


def test_a_step_compiles_once_and_keeps_every_array_where_it_is(sharded):
    model, params = sharded(Layout(data=2, context=2, heads=2))
    cache = Dense().init(model, batch=BATCH, capacity=64)
    places = [x.sharding for x in jax.tree.leaves(cache)]
    _, cache = kvjax.prefill(model, params, cache, TOKENS, LENGTHS)
    with Compiles() as compiles:
        for token in (3, 4, 5):
            logits, cache = kvjax.decode_step(model, params, cache, jnp.full(BATCH, token, jnp.int32))
    assert compiles.of("decode_step") == 1
    assert logits.sharding.is_fully_replicated and cache.length.sharding.is_fully_replicated
    for x, place in zip(jax.tree.leaves(cache), places, strict=True):
        if x.ndim > 2:
            assert x.sharding.is_equivalent_to(place, x.ndim)


def test_only_the_owner_of_a_slot_writes_it(sharded):
    """Other devices' slots of a context stay as they are, bit for bit."""
    model, params = sharded(Layout(context=4))
    cache = Dense().init(model, batch=BATCH, capacity=64)
    _, cache = kvjax.prefill(model, params, cache, TOKENS, np.full(BATCH, 13))  # 13 // page 16 is the first device's
    before = np.asarray(cache.layers[0].layer.k)
    _, cache = kvjax.prefill(model, params, cache, TOKENS[:, :4])
    changed = (np.asarray(cache.layers[0].layer.k) != before).any((0, 1, 3)).reshape(4, -1).sum(1)
    assert changed.tolist() == [3, 1, 0, 0]
    before = np.asarray(cache.layers[0].layer.k)
    _, cache = kvjax.decode_step(model, params, cache, jnp.full(BATCH, 9, jnp.int32))
    changed = (np.asarray(cache.layers[0].layer.k) != before).any((0, 1, 3)).reshape(4, -1).sum(1)
    assert changed.tolist() == [0, 1, 0, 0]


def test_parameters_come_back_in_their_own_order(sharded):
    model, params = sharded(Layout(data=2, heads=4))
    kernel = params["layers"][0]["down"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0], kernel.shape[1] // 4)
    jax.tree.map(np.testing.assert_array_equal, gather_params(params, model), model_of()[1])


def test_what_a_mesh_cannot_share_is_refused_by_name(sharded, unchecked, tmp_path):
    model, params = model_of()
    with pytest.raises(ValueError, match="`heads` must divide the model's kv_heads, 4, got 3"):
        shard(model, params, Layout(heads=3).mesh())
    with pytest.raises(ValueError, match="needs 16 devices, got 8"):
        Layout(data=16).mesh()
    data, context = sharded(Layout(data=8))[0], sharded(Layout(context=8))[0]
    with pytest.raises(ValueError, match="`data` must divide the batch, 4 rows, got 8"):
        Dense().init(data, batch=4, capacity=8)
    with pytest.raises(ValueError, match="`data` must be 1 for PagedLayer, got 8"):
        Paged(page=4).init(data, batch=8, capacity=8)
    for strategy in (Ring(window=4), Quantized(8, residual=8), Paged(page=4)):
        with pytest.raises(ValueError, match=f"must be dense, as `Dense.*got {type(strategy).__name__}Layer"):
            strategy.init(context, batch=1, capacity=64)
    with pytest.raises(ValueError, match="on no mesh yet, got Shared"):
        shard_cache(Shared().init(model, batch=2, capacity=8), Layout(heads=2).mesh())
    with pytest.raises(ValueError, match="save_model: expected a model of one device"):
        kvjax.save_model(tmp_path / "model", (data, params, None))
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="`mesh` must have the axes"):
        replace(model.accelerate, mesh=other)
