"""The experiment `multi_gpu` on virtual devices: every layout does the same work, on its own devices."""

import jax
import numpy as np
import pytest

from experiments import gpu_model, multi_gpu
from experiments.multi_gpu import Config, drawn, full, on, parse_layout
from kvjax.model import cached
from tests.accelerate.shared import model_of

TINY = {
    "vocab": 64,
    "hidden": 32,
    "intermediate": 64,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 8,
    "max_positions": 512,
    "tied": False,
    "layers": 2,
}


def test_a_row_for_each_layout_and_split(monkeypatch):
    monkeypatch.setitem(gpu_model.SHAPES, "tiny", TINY)
    done = []
    config = Config("tiny", ("1x1x1", "2x1x2"), ("1x40", "2x40"), (100,), (1, 4), "float32", steps=2, turns=2)
    rows = multi_gpu.run(config, lambda what, share: done.append(share))
    assert [(row["what"], row["layout"], row["devices"], row["batch"]) for row in rows] == [
        ("decode", "1x1x1", 1, 1),  # one row cannot be shared by two groups
        ("decode", "1x1x1", 1, 2),
        ("decode", "2x1x2", 4, 2),
        ("attention", "1x1x1", 1, 1),
        ("attention", "1x4x1", 4, 1),
    ]
    assert done == sorted(done) and done[-1] < 1
    for row in rows:
        low, high = row["range"]
        assert 0 < low <= row["ms"] <= high
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["share_of_bandwidth"] is None  # of a CPU
    for row in rows[0], rows[1], rows[3]:
        assert row["speed_up"] == 1


def test_what_is_drawn_lies_on_the_mesh_and_is_full():
    model = on(parse_layout("2x2x2"), model_of()[0])
    params, cache = drawn(model), full(model, 2, 40, 2)
    for leaf in (params["head"], params["layers"][0]["qkv"]["kernel"], cache.layers[0].layer.k):
        assert len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated
    assert cache.length.tolist() == [40, 40] and cache.capacity == 64
    logits, cache = jax.jit(lambda p, c, t: cached(model, p, t, None, c))(params, cache, np.full((2, 1), 3, np.int32))
    assert np.isfinite(np.asarray(logits)).all() and cache.length.tolist() == [41, 41]


def test_what_it_refuses():
    for bad, message in (
        ({"model": "gpt-5"}, "`model` must be among"),
        ({"layouts": ("4",)}, "DATAxCONTEXTxHEADS, such as 1x1x4, got '4'"),
        ({"layouts": ()}, "`layouts` must name at least one"),
        ({"works": ("8",)}, "BATCHxCONTEXT"),
        ({"splits": (0,)}, "`splits` must be at least 1"),
        ({"turns": 0}, "`turns` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**bad)
    with pytest.raises(ValueError, match="needs 16 devices, got 8"):
        multi_gpu.run(Config(layouts=("16x1x1",)), lambda *_: None)
