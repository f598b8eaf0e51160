"""Which kernel attention is given to, and that derivatives, `vmap` and other devices are served all the same."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels import attention, dispatch, reference
from kernels.reference import Mask
from kvjax import Acceleration, Precision
from kvjax.cache import Dense, Quantized, Ring
from tests.kernels.marks import interpreted
from tests.tiny import tiny

MASK = Mask(0.1, window=200)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if there were such a GPU: traced programs have the kernel for it, and the reference for other devices."""
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    monkeypatch.setattr(dispatch, "_told", set())


def draw(dtype=jnp.bfloat16, dim=64, slots=256, width=1):
    """Queries, a new token, keys, values, positions, slots and where the token goes, for two rows of two K/V heads."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, width, 6, dim), dtype)
    new = [jax.random.normal(key, (4, 1, dim), dtype) for key in keys[1:3]]
    k, v = (jax.random.normal(key, (4, slots, dim), dtype) for key in keys[3:])
    nth = jnp.arange(slots, dtype=jnp.int32)[None]
    at = jnp.asarray([[100], [250]], jnp.int32)
    return q, new, (k, v), at, jnp.where(nth < at, nth, -1), at[:, 0]


def same(got, want):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(*(z.astype(jnp.float32) for z in (x, y)), rtol=2e-2), got, want
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_without_such_a_gpu_xla_runs_it():
    assert not dispatch.hopper()
    q, _, (k, v), *_ = draw()
    assert attention.backend_of(q, k, v) == "xla"


@pytest.mark.usefixtures("on_hopper")
def test_many_slots_have_a_kernel_for_few_queries_and_one_for_many():
    q, _, (k, v), *_ = draw()
    assert attention.backend_of(q, k, v) == "mosaic"
    assert attention.backend_of(q, k, v, "xla") == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention.backend_of(q, k[:, :128], v[:, :128]) == "xla"
        wide = draw(width=32)[0]
        assert attention.backend_of(wide, k, v) == "mosaic"
    assert [attention._suited(x, k)[1].__name__ for x in (q, wide)] == ["decode_attention", "prefill_attention"]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("changed", "why"),
    [({"dtype": jnp.float32}, "float32"), ({"dim": 40}, "head_dim"), ({"slots": 260}, "260")],
    ids=["dtype", "head size", "slots"],
)
def test_what_the_kernel_does_not_take_is_left_to_xla_with_one_warning(changed, why):
    q, new, (k, v), at, held, to = draw(**changed)
    with pytest.warns(UserWarning, match=why) as seen:
        got = attention.append(q, *new, k, v, at, held, to, MASK)
        assert attention.backend_of(q, k, v) == "xla"
    assert len(seen) == 1
    same(got, reference.append(q, *new, k, v, at, held, to, MASK))
    with pytest.raises(ValueError, match=why):
        attention.append(q, *new, k, v, at, held, to, replace(MASK, backend="mosaic"))
    with pytest.raises(ValueError, match=why):
        attention.attend(q, k, v, at, held, replace(MASK, backend="mosaic"))


def test_a_backend_that_there_is_not_is_refused():
    q, _, (k, v), at, held, _ = draw()
    with pytest.raises(ValueError, match=r"mosaic, xla or None, got 'cuda'"):
        attention.attend(q, k, v, at, held, replace(MASK, backend="cuda"))


@interpreted
@pytest.mark.usefixtures("on_hopper")
def test_derivatives_are_those_of_the_reference():
    q, new, (k, v), at, held, to = draw()

    def loss(backend):
        def of(q, new, k, v):
            mask = replace(MASK, backend=backend)
            out, lse, *_ = attention.append(q, *new, k, v, at, held, to, mask)
            seen, _ = attention.attend(q, k, v, at, held, mask)
            return (out * 3 + seen).astype(jnp.float32).sum() + lse.sum()

        return of

    got, want = (jax.jit(jax.grad(loss(backend), (0, 1, 2, 3)))(q, new, k, v) for backend in (None, "xla"))
    same(got, want)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(want))
    moved = [jax.jvp(loss(backend), (q, new, k, v), (q, new, k, v))[1] for backend in (None, "xla")]
    same(*moved)


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("shared", [False, True], ids=["caches apart", "one cache"])
def test_vmap_is_a_larger_batch(shared):
    q, new, (k, v), at, held, to = draw()
    several = [jnp.stack([x, x + 1]) for x in (q, *new, k, v)]
    axes = (0, 0, 0, *((None, None) if shared else (0, 0)))
    given = [*several[:3], *((k, v) if shared else several[3:])]

    def step(backend):
        return lambda *some: attention.append(*some, at, held, to, replace(MASK, backend=backend))

    got, want = (jax.jit(jax.vmap(step(backend), axes))(*given) for backend in (None, "xla"))
    assert [x.shape for x in got] == [x.shape for x in want]
    same(got, want)


@interpreted
@pytest.mark.parametrize("name", ["attend", "append"])
def test_the_kernel_itself_is_batched_and_derived(name):
    """In the interpreter: `vmap` gives the kernel a larger batch, and derivatives do not go through it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, new, (k, v), at, held, to = draw(slots=128)
    arrays = (q, k, v) if name == "attend" else (q, *new, k, v)
    rest = (at, held) if name == "attend" else (at, held, to)

    def call(backend, **how):
        return lambda *some: getattr(attention, name)(*some, *rest, replace(MASK, backend=backend), **how)

    ours, want = call("mosaic", interpret=plgpu.InterpretGPUParams()), call("xla")
    several = [jnp.stack([x, x + 1]) for x in arrays]
    same(jax.vmap(ours)(*several), jax.vmap(want)(*several))
    moved = [jax.jvp(f, arrays, arrays) for f in (ours, want)]
    same(*moved)


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("chosen", "ours"), [(None, True), ("xla", False)])
@pytest.mark.parametrize("strategy", [Dense(), Ring(window=300, sinks=4), Quantized(4)], ids=str)
def test_a_model_says_what_its_layers_run(strategy, chosen, ours):
    small, _ = tiny()
    model = kvjax.Transformer(
        replace(small.config, head_dim=32), Precision(*("bfloat16",) * 3), accelerate=Acceleration(chosen, "xla")
    )
    params = kvjax.init_params(model, jax.random.key(0))
    cache = strategy.init(model, batch=1, capacity=512)
    program = str(jax.make_jaxpr(kvjax.decode_step, static_argnums=0)(model, params, cache, jnp.zeros(1, jnp.int32)))
    assert ("mpmd_map" in program) == (ours and not isinstance(strategy, Quantized))


def test_an_acceleration_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'xla' or None, got 'cuda'"):
        Acceleration("cuda")


@interpreted
@pytest.mark.usefixtures("on_hopper")
def test_a_program_for_the_gpu_writes_in_place():
    q, new, (k, v), at, held, to = draw()
    step = jax.jit(lambda *args: attention.append(*args, MASK), donate_argnums=(3, 4))
    lowered = step.trace(q, *new, k, v, at, held, to).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in lowered.splitlines() if "custom_call @mosaic_gpu" in line]
    assert call.count("#stablehlo.output_operand_alias<") == 2
    assert "scatter" not in lowered.split("custom_call @mosaic_gpu")[1]


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_prompt_is_seen_by_the_kernel_for_many_queries(backend):
    q, _, (k, v), _, held, _ = draw(width=250, slots=300)
    at = jnp.arange(250, dtype=jnp.int32)[None] + jnp.zeros((2, 1), jnp.int32)
    step = jax.jit(lambda *args: attention.attend(*args, Mask(0.1, backend=backend)))
    lowered = step.trace(q, k, v, at, held).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == (backend is None)
