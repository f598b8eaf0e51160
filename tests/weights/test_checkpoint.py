"""Save and restore bit for bit, and trees that do not fit."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.weights.gguf_file import read_gguf
from kvjax.weights.vocab import from_gguf
from tests.compiles import Compiles
from tests.tiny import tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    k: jax.Array
    extra: tuple


def state():
    odd = jnp.array([0x7FC00001, 0x80000000, 0x00000001], jnp.uint32).view(jnp.float32)  # a NaN's payload, -0, denormal
    extra = (
        {"bf16": jnp.array([1.5, -2], jnp.bfloat16), "none": None, "int4": jnp.array([-8, 7], jnp.int4)},
        jax.random.key(3),
        jax.random.split(jax.random.key(4, impl="rbg"), 2),
        jnp.zeros((0, 3), jnp.int8),
        np.arange(3, dtype=np.int64),
        True,
        7,
        0.1,
    )
    return State(odd, extra)


def bits(leaf):
    leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and leaf.dtype.name.startswith("key") else leaf
    return type(leaf), str(getattr(leaf, "dtype", "")), np.asarray(leaf).tobytes()


def test_every_kind_of_leaf_survives_bit_for_bit(tmp_path):
    tree = state()
    kvjax.save(tmp_path / "a", tree)
    again = kvjax.restore(tmp_path / "a", tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert [bits(leaf) for leaf in jax.tree.leaves(again)] == [bits(leaf) for leaf in jax.tree.leaves(tree)]
    assert jax.random.key_impl(again.extra[2]) == "rbg"


def test_restoring_into_shapes_gives_arrays(tmp_path):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "key": jax.random.split(jax.random.key(0, impl="rbg"), 3)}
    kvjax.save(tmp_path / "a", tree)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    again = kvjax.restore(tmp_path / "a", like)
    assert [bits(leaf) for leaf in jax.tree.leaves(again)] == [bits(leaf) for leaf in jax.tree.leaves(tree)]
    with pytest.raises(ValueError, match=r"\['key'\] is key rbg\[3\] where key threefry2x32\[3\] was expected"):
        kvjax.restore(tmp_path / "a", tree | {"key": jax.random.split(jax.random.key(0), 3)})


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4), seed=st.integers(0, 99))
def test_any_tree_survives(shapes, seed, tmp_path):
    rng = np.random.default_rng(seed)
    tree = [{"x": jnp.asarray(rng.normal(size=shape), jnp.float32)} for shape in shapes]
    kvjax.save(tmp_path / "a", tree)  # and replaces what was there
    chex.assert_trees_all_equal(kvjax.restore(tmp_path / "a", tree), tree)


def test_another_tree_is_refused_with_names(tmp_path):
    kvjax.save(tmp_path / "a", {"x": jnp.zeros(2), "y": (jnp.zeros(3), jnp.zeros(1)), "old": jnp.zeros(1)})
    like = {"x": jnp.zeros(2, jnp.bfloat16), "y": (jnp.zeros(4), jnp.zeros(1)), "new": jnp.zeros(1)}
    with pytest.raises(ValueError) as caught:
        kvjax.restore(tmp_path / "a", like)
    for part in (
        "['old'] is only in the checkpoint",
        "['new'] is not in the checkpoint",
        "['x'] is float32[2] where bfloat16[2] was expected",
        "['y'][0] is float32[3] where float32[4] was expected",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="and 16 more"):
        kvjax.restore(tmp_path / "a", [jnp.zeros(1)] * 17)


def test_a_missing_or_spoilt_checkpoint_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing"):
        kvjax.restore(tmp_path / "nothing", {})
    tree = {"x": jnp.zeros(2)}
    kvjax.save(tmp_path / "a", tree)
    for file in (tmp_path / "a" / "leaves").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        kvjax.restore(tmp_path / "a", tree)


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    tree = {"x": jnp.ones(2)}
    kvjax.save(tmp_path / "a", tree)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        kvjax.save(tmp_path / "a", {"x": jnp.zeros(2)})
    monkeypatch.undo()
    chex.assert_trees_all_equal(kvjax.restore(tmp_path / "a", tree), tree)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("")
    with pytest.raises(FileExistsError, match="thesis"):
        kvjax.save(tmp_path / "thesis", {"x": jnp.zeros(1)})
    with pytest.raises(TypeError, match=r"leaf \['x'\] must be an array or a number"):
        kvjax.save(tmp_path / "a", {"x": "text"})


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama3_scaled"])
def test_a_model_survives(name, golden, tmp_path):
    tokenizer = from_gguf(read_gguf(golden / "tokens" / "spm.gguf"))
    loaded = kvjax.load(golden / "families" / name)._replace(tokenizer=tokenizer)
    kvjax.save_model(tmp_path / "model", loaded)
    model, params, again = kvjax.load(tmp_path / "model")
    assert model == loaded.model
    chex.assert_trees_all_equal(params, loaded.params)
    fields = {k: v for k, v in vars(tokenizer).items() if k not in ("inner", "pieces")}
    assert {k: v for k, v in vars(again).items() if k not in ("inner", "pieces")} == fields
    assert again.encode("a b c") == tokenizer.encode("a b c")
    half = kvjax.load(tmp_path / "model", precision=kvjax.Precision(params="bfloat16"))
    chex.assert_trees_all_equal_shapes_and_dtypes(half.params, kvjax.param_shapes(half.model))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"kvjax\.json: .*tokenizer\.json cannot be read"):
        kvjax.load(tmp_path / "model")


def test_what_was_restored_runs_by_the_programs_there_are(tmp_path):
    model, params = tiny()
    cache = kvjax.cache.Dense().init(model, batch=1, capacity=8)
    _, cache = kvjax.decode_step(model, params, cache, jnp.array([1]))
    kvjax.save_model(tmp_path / "model", (model, params, None))
    kvjax.save(tmp_path / "cache", cache)
    with Compiles() as compiles:
        kvjax.decode_step(model, kvjax.load(tmp_path / "model").params, cache, jnp.array([2]))
        fresh = kvjax.cache.Dense().init(model, batch=1, capacity=8)
        kvjax.decode_step(model, params, kvjax.restore(tmp_path / "cache", fresh), jnp.array([2]))
    assert compiles.of("decode_step") == 0


def test_a_spoilt_model_is_said(golden, tmp_path):
    kvjax.save_model(tmp_path / "model", kvjax.load(golden / "families" / "gpt2"))
    (tmp_path / "model" / "kvjax.json").write_text('{"format": "kvjax-model-1"}')
    with pytest.raises(ValueError, match=r"kvjax\.json: not what kvjax\.save_model writes"):
        kvjax.load(tmp_path / "model")
