"""The experiment `gpu_tune` as far as a CPU goes: what it asks the tuner, what it keeps, and that kernels lower."""

import json
from importlib import import_module

import jax
import jax.numpy as jnp
import pytest

from experiments import gpu_tune
from experiments.gpu_tune import BITS, SHAPES, Config, every_shape, fingerprint, run, table_folder
from kernels.decode_plan import Tiling
from kernels.prefill_attention import Blocks
from kernels.reference import Mask, attend
from kvjax import cli
from kvjax.accelerate.table import SHIPPED, table
from tests.accelerate.made_up import FACTS
from tests.kernels.marks import interpreted

SMALL = Config(
    ("decode",), ("2x64", "1x128"), (), heads=4, kv_heads=2, head_dim=32, tiles=(64, 128), stages=(2,), workers=(0,),
    whole=(2,), calls=2, turns=2,
)  # fmt: skip


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert cli.main(["experiment", "gpu_tune"]) == 2
    assert "gpu_tune: needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture
def tuned_here(monkeypatch, tmp_path):
    """A kernel that runs on any machine, where tiles of 128 slots are the fastest; and the sizes that were timed."""
    timed = []

    def timing(call, inputs, calls):
        size = inputs[0][5]
        timed.append(size)
        return [100.0 / size] * calls

    def decode(tiling, q, k, v, at, slots, size):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        out, lse = attend(*wide, at, slots, Mask(32**-0.5))
        return out * (1.1 if tiling.tile == 256 else 1.0), lse

    def planned(mask, kv_heads, at, slots, tiling, q, k, v):
        return q, k, v, at, slots, tiling.tile

    monkeypatch.setattr(gpu_tune, "require_gpu", lambda name: None)
    monkeypatch.setattr(gpu_tune, "facts", lambda: FACTS)
    monkeypatch.setattr(gpu_tune, "_planned", planned)
    monkeypatch.setattr(gpu_tune, "decode_attention", lambda *args, work, tiling: decode(tiling, *args[:5], work))
    monkeypatch.setattr(import_module("kvjax.accelerate.tune"), "microseconds", timing)
    monkeypatch.setattr(import_module("kvjax.accelerate.tune"), "cold_bytes", lambda cache, platform: 1)
    return timed, str(tmp_path)


def config(folder, **changes):
    return Config(**{**SMALL.__dict__, "into": folder, **changes})


def test_a_shape_is_tuned_once_and_kept(tuned_here):
    timed, folder = tuned_here
    told = []
    rows = run(config(folder), lambda doing, done: told.append(done))
    assert [row["shape"] for row in rows] == ["decode, 2x64", "decode, 1x128"]
    assert all(row["config"].startswith("tile 128") and row["us"] == 100 / 128 for row in rows)
    assert len(timed) == 2 * 3 and told == sorted(told)
    kept = table(gpu_tune.device_name(jax.devices()[0]), table_folder(folder))
    assert [row["sizes"] for row in kept] == [{"slots": 128}, {"slots": 64}]
    assert kept[1]["exact"] == {"dtype": "bfloat16", "head_dim": 32, "queries": 2, "rows": 4}
    for name in ("date", "commit", "jax", "jaxlib", "source", "limit", "share", "errors", "range"):
        assert name in kept[0]
    assert kept[0]["default"]["tile"] == 128 and kept[0]["default_us"] == 100 / 128

    assert run(config(folder), lambda *_: None) == rows and len(timed) == 6
    run(config(folder, again=True), lambda *_: None)
    assert len(timed) == 12


def test_another_source_is_tuned_again_and_a_wrong_config_refused(tuned_here, monkeypatch):
    timed, folder = tuned_here
    run(config(folder), lambda *_: None)
    monkeypatch.setattr(gpu_tune, "fingerprint", lambda operation: "changed")
    rows = run(config(folder, tiles=(64, 128, 256)), lambda *_: None)
    assert all(row["refused"] == 1 and row["source"] == "changed" for row in rows)
    assert all(row["config"].startswith("tile 128") for row in rows)


def test_sources_tell_kernels_apart():
    assert len({fingerprint(name) for name in ("decode", "prefill")}) == 2
    assert fingerprint("decode") == fingerprint("decode_packed")


def test_the_default_is_tried_first_and_tiles_of_codes_have_as_many_bytes():
    wide = Config(tuple(SHAPES), ("1x8192",), ("1x2048",))
    shapes = {shape.name.partition(",")[0]: shape for shape in every_shape(wide)}
    assert list(shapes) == list(SHAPES)
    assert shapes["decode"].configs[0] == Tiling(64, 2, 128, whole=2)
    assert shapes["prefill"].configs[0] == Blocks()
    for name, bits in BITS.items():
        assert {tiling.tile for tiling in shapes[name].configs} == {64 * 16 // bits, 128 * 16 // bits}
    assert all(len(set(shape.configs)) == len(shape.configs) > 3 for shape in shapes.values())


@interpreted
@pytest.mark.parametrize("kernel", SHAPES)
def test_configs_lower_for_a_gpu(kernel):
    """And give the reference's shapes. The largest, with more stages, do not fit: those the tuner refuses."""
    small = Config((kernel,), ("1x8192",), ("1x2048",))
    (shape,) = every_shape(small)
    inputs = jax.eval_shape(shape.case.draw, jax.random.key(0))
    want = jax.eval_shape(shape.operation.reference, *inputs)
    for tiling in shape.configs[:2]:

        def call(*inputs, tiling=tiling):
            return shape.operation.call(tiling, *shape.operation.arrange(tiling, *inputs))

        traced = jax.jit(call).trace(*inputs)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        got = traced.out_info
        assert [x.shape for x in jax.tree.leaves(got)] == [x.shape for x in jax.tree.leaves(want)]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`kernels` must be among decode, int8"):
        Config(("fp8",), (), ())
    with pytest.raises(ValueError, match="BATCHxCONTEXT"):
        Config((), ("8",), ())
    with pytest.raises(ValueError, match="`stages` must have an entry"):
        Config((), (), (), stages=())
    assert table_folder("user") is None and table_folder("package") == SHIPPED
    json.dumps(SMALL.__dict__)
