"""The work of a whole step is what goes into the compiled program, and the operations that XLA counts in it."""

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax.accelerate.model_work import decode_step, prefill
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring
from tests.tiny import FAMILIES

STRATEGIES = {
    "dense": Dense(),
    "ring": Ring(window=24, sinks=4),
    "quantized": Quantized(4, residual=8),
    "paged": Paged(page=8),
    "evicting": Evicting(budget=16, sinks=1, recent=3),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_reads_its_weights_and_cache(name):
    """All that goes into the compiled step and its logits, but for the new token's keys and the token itself."""
    model = kvjax.Transformer(FAMILIES["llama"])
    params = kvjax.param_shapes(model)
    cache = STRATEGIES[name].shapes(model, batch=2, capacity=64)
    work = decode_step(model, STRATEGIES[name], batch=2, context=64)
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = kvjax.decode_step.lower(model, params, cache, token).compile()
    into = compiled.memory_analysis().argument_size_in_bytes
    logits = 2 * FAMILIES["llama"].vocab * 4
    written = kvjax.nbytes(cache.layers) / 64
    lengths = kvjax.nbytes((cache.length, token))
    repeated = 2 * 2 * 4  # each layer's own lengths, which some strategies do not look at
    assert work.bytes == pytest.approx(into - lengths + logits + written, abs=repeated + 1)


def test_tables_that_are_no_head_are_read_by_the_row():
    for family, table in (("mistral", "embed"), ("gpt2", "positions")):
        model = kvjax.Transformer(FAMILIES[family])
        params = kvjax.param_shapes(model)
        work = decode_step(model, Dense(), batch=2, context=6)
        cache = Dense().shapes(model, batch=2, capacity=6)
        logits = 2 * model.config.vocab * 4
        kept = kvjax.nbytes(cache.layers)
        rows = 2 * params[table].shape[1] * 4
        expected = kvjax.nbytes(params) - kvjax.nbytes(params[table]) + rows + kept + kept // 6 + logits
        assert work.bytes == expected


def test_layers_with_a_window_read_what_is_inside():
    model = kvjax.Transformer(FAMILIES["gemma2"])  # windows of 6 and none
    inside, outside = (decode_step(model, Dense(), batch=1, context=n) for n in (60, 120))
    layer = Dense().shapes(model, batch=1, capacity=60).layers[0]
    tokens = 2 * layer.k.size * 4
    assert outside.bytes - inside.bytes == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("width", [1, 32])
def test_operations_of_a_whole_model(width):
    """XLA counts softmax, norms and the pairs above the diagonal too; products are nearly all of a model this wide."""
    model = kvjax.Transformer(
        kvjax.ModelConfig(
            "llama", vocab=512, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, max_positions=64,
            windows=(None, None),
        )
    )  # fmt: skip
    params = kvjax.param_shapes(model)
    tokens = jax.ShapeDtypeStruct((2, width), jnp.int32)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, last=True)[0])
    flops = run.lower(params, tokens).cost_analysis()["flops"]
    step = decode_step(model, Dense(), batch=2, context=1) if width == 1 else None
    work = step or prefill(model, Dense(), batch=2, width=width)
    assert 0.9 * flops < work.flops <= flops
