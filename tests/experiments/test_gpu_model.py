"""The experiment `gpu_model` as far as a CPU goes: engines do the same work, and the ceiling counts what they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gpu_model
from experiments.gpu_model import ENGINES, Config, drawn, measured, needed, shaped

TINY = {
    "vocab": 61,
    "hidden": 32,
    "intermediate": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "max_positions": 512,
    "layers": 2,
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(gpu_model.SHAPES, "tiny", TINY | {"tied": False})
    monkeypatch.setitem(gpu_model.SHAPES, "tied", TINY | {"tied": True})


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_engines_do_the_same_work(name):
    model = shaped(name, "float32")
    params, tokens = drawn(model), jnp.asarray([5, 6], jnp.int32)
    logits = []
    for engine in ENGINES.values():
        cache, step = engine(model, 2, 64, 40)
        first, cache = step(params, cache, tokens)
        second, cache = step(params, cache, first.argmax(-1).astype(jnp.int32))
        logits.append(np.stack([first, second]))
        assert np.asarray(cache.length).max() == 42
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_a_row_for_each_engine():
    model = shaped("tiny", "float32")
    params = drawn(model)
    config = Config(("tiny",), tuple(ENGINES), ("2x40",), weights="float32", steps=3, turns=2)
    rows = measured(config, "tiny", model, params, 2, 40, 1e9)
    assert [row["engine"] for row in rows] == list(ENGINES)
    for row in rows:
        low, high = row["range"]
        assert 0 < low <= row["ms"] <= high
        assert row["share_of_ceiling"] == pytest.approx(needed(model, params, 2, 40) / 1e9 / (1e-3 * row["ms"]))
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"])


@pytest.mark.usefixtures("tiny")
def test_a_step_reads_weights_and_context_but_no_table():
    attention = 32 * (4 + 2 * 2) * 8 + 32 * 32
    weights = 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32 + 61 * 32
    kept = 2 * 3 * 40 * 2 * 2 * 8
    for name in ("tiny", "tied"):
        model = shaped(name, "float32")
        assert needed(model, drawn(model), 3, 40) == 4 * (weights + kept)


@pytest.mark.usefixtures("tiny")
def test_what_it_refuses():
    good = {"models": ("tiny",), "engines": ("kvjax",), "works": ("1x8",)}
    for bad, message in (
        ({"models": ("gpt-5",)}, "models"),
        ({"engines": ("vllm",)}, "engines"),
        ({"works": ("8",)}, "BATCHxCONTEXT"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**(good | bad))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
@pytest.mark.usefixtures("tiny")
def test_it_says_that_it_needs_a_gpu():
    with pytest.raises(RuntimeError, match="gpu_model: needs an NVIDIA GPU"):
        gpu_model.run(Config(("tiny",), ("kvjax",), ("1x8",)), lambda *_: None)
