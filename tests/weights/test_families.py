"""Every family against the logits of `transformers`; golden files by tests/golden/make_families.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax

CASES = sorted((Path(__file__).parents[1] / "golden" / "families").iterdir())
GGUF_CASES = [case for case in CASES if case.name not in ("llama3_scaled", "llama_yarn", "qwen3_yarn", "qwen2_windows")]
ATOL = {"float32": 1e-4, "bfloat16": 1.0}  # logits have a standard deviation of 2 to 6


def logits(model, params, golden):
    out, _ = model.apply({"params": params}, jnp.asarray(golden["tokens"]), jnp.asarray(golden["lengths"]))
    valid = np.arange(out.shape[1])[None] < golden["lengths"][:, None]
    return np.where(valid[..., None], np.asarray(out, np.float32), 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case):
    golden = load_file(case / "golden.safetensors")
    model, params, tokenizer = kvjax.load(case)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, kvjax.param_shapes(model))
    np.testing.assert_allclose(logits(model, params, golden), golden["logits"], atol=ATOL["float32"], rtol=0)
    assert tokenizer is None


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_bfloat16_weights_stay_close(golden, name):
    expected = load_file(golden / "families" / name / "golden.safetensors")
    precision = kvjax.Precision(params="bfloat16", compute="float32")
    model, params, _ = kvjax.load(golden / "families" / name, precision=precision)
    assert params["embed"].dtype == jnp.bfloat16
    assert params["norm"]["scale"].dtype == jnp.float32
    np.testing.assert_allclose(logits(model, params, expected), expected["logits"], atol=ATOL["bfloat16"], rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral_window", lambda c: {"windows": (None,) * c.layers}),
        ("qwen2_windows", lambda c: {"windows": c.windows[::-1]}),
        ("gemma2", lambda c: {"windows": (c.windows[0], *c.windows[:2])}),
        ("gemma2", lambda c: {"attention_softcap": None}),
        ("gemma2", lambda c: {"logit_softcap": None}),
        ("gemma2", lambda c: {"query_scale": None}),
        ("gemma2", lambda c: {"embed_scale": 1.0}),
        ("llama3_scaled", lambda c: {"rope": replace(c.rope, scaling="linear")}),
        ("llama_linear_bias", lambda c: {"rope": replace(c.rope, factor=2.4)}),
        ("llama_yarn", lambda c: {"rope": replace(c.rope, attention_factor=1.0)}),
        ("qwen3_yarn", lambda c: {"rope": replace(c.rope, truncate=True)}),
        ("gpt2", lambda c: {"activation": "gelu"}),
    ],
)
def test_golden_logits_notice_each_setting(golden, name, change):
    """A golden file that a wrong setting also passes would prove nothing."""
    expected = load_file(golden / "families" / name / "golden.safetensors")
    model, params, _ = kvjax.load(golden / "families" / name)
    other = model.clone(config=replace(model.config, **change(model.config)))
    worst = np.abs(logits(other, params, expected) - expected["logits"]).max()
    assert worst > 5 * ATOL["float32"]


@pytest.mark.parametrize("case", GGUF_CASES, ids=lambda case: case.name)
def test_gguf_gives_the_same_parameters(case, write_gguf):
    model, params, _ = kvjax.load(case)
    other, again, _ = kvjax.load(write_gguf(case, keys=_scaling(case)))
    same = {"family": model.config.family}  # a GGUF calls Mistral llama, and has no place for Gemma's query scale
    if case.name == "gemma2":
        same["query_scale"] = model.config.query_scale
    assert replace(other.config, **same) == model.config
    chex.assert_trees_all_equal(again, params)


def _scaling(case):
    rope = json.loads((case / "config.json").read_text()).get("rope_parameters") or {}
    if rope.get("rope_type") != "linear":
        return []
    return [
        lambda out: out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda out: out.add_rope_scaling_factor(rope["factor"]),
    ]


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of a golden folder, to be spoilt."""

    def copy(name):
        shutil.copytree(golden / "families" / name, tmp_path / name)
        return tmp_path / name

    return copy


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_separate_head_is_its_own_array(golden):
    _, params, _ = kvjax.load(golden / "families" / "mistral")
    assert params["head"].shape == params["embed"].shape
    assert not np.array_equal(params["head"], params["embed"])
    assert "head" not in kvjax.load(golden / "families" / "smollm2").params


def test_all_missing_tensors_are_named_at_once(folder):
    path = folder("llama2")
    edit(path, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)])
    with pytest.raises(ValueError, match=r"2 tensors are missing: layers\.0\.mlp\.up_proj.*layers\.1\.mlp\.up_proj"):
        kvjax.load(path)


def test_all_wrong_shapes_are_named_at_once(folder):
    path = folder("llama2")

    def shorten(tensors):
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["lm_head.weight"] = np.ones((96, 16), np.float32)

    edit(path, shorten)
    with pytest.raises(ValueError, match=r"2 tensors have a wrong shape: lm_head.*\[96, 16\].*\[96, 32\].*norm.weight"):
        kvjax.load(path)


def test_a_tensor_without_a_place_is_refused(folder):
    path = folder("llama2")
    edit(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}))
    with pytest.raises(ValueError, match=r"1 tensors have no place.*q_proj\.bias"):
        kvjax.load(path)


def test_what_old_checkpoints_carry_along_is_ignored(folder):
    path = folder("gpt2")
    _, params, _ = kvjax.load(path)

    def age(tensors):
        for name in list(tensors):  # the first GPT-2 files have no prefix, and hold their causal mask
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit(path, age)
    chex.assert_trees_all_equal(kvjax.load(path).params, params)


def test_shards_are_joined(folder):
    path = folder("qwen2")
    _, params, _ = kvjax.load(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = {f"model-{i}-of-2.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    for name, part in shards.items():
        save_file(part, path / name)
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(kvjax.load(path).params, params)
    (path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1-of-2\.safetensors"):
        kvjax.load(path)


def test_unknown_architecture_lists_the_known(folder):
    path = folder("llama2")
    (path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"config\.json: architecture 'mamba' is not known; known are llama, mistral"):
        kvjax.load(path)
