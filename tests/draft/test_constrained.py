"""speculate with grammars: the tokens of constrained generate, by drafts that guess within the grammar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense, Paged, Quantized
from kvjax.draft import Branches, Chain, DraftModel, Heads, PromptLookup, state, widths
from kvjax.grammar import regex
from tests.grammar.expressions import END, small_tokenizer
from tests.tiny import prompts, tiny

TOKENIZER, KEY = small_tokenizer(), jax.random.key(5)
CACHES = {"dense": Dense(), "paged": Paged(page=4, pool=40), "quantized": Quantized(8, residual=8)}
DRAFTS = {
    "lookup": lambda: PromptLookup(k=3, shortest=1),
    "model": lambda: DraftModel(*off(), k=3),
    "chain": lambda: Chain((PromptLookup(k=3), DraftModel(*off(), k=2))),
    "tree": lambda: Branches((PromptLookup(k=3, shortest=1), PromptLookup(k=2, shortest=1, skip=1))),
    "heads": lambda: heads(),
}


def off():
    """A model that is often right, and often wrong."""
    model, params = tiny()
    return model, jax.tree.map(lambda x: x + 0.03 * x.std() * jax.random.normal(jax.random.key(1), x.shape), params)


def heads():
    model, params = tiny()
    trained = Heads.fresh(model, params, np.arange(model.config.vocab, dtype=np.int32), jax.random.key(2))
    return Heads.of(model, params, trained=trained, k=2)


def decode(decoder, strategy, heat=0.0, **more):
    model, params = tiny()
    rows = [
        Sampling(grammar=regex("((ab|cd|ba)[0-9]?){3,9}", TOKENIZER), stop=[END], temperature=heat),
        Sampling(temperature=heat),
        Sampling(grammar=regex("(a|b){5}[a-z]{4,7}!", TOKENIZER), temperature=heat),
    ]
    cache = strategy.init(model, batch=3, capacity=64)
    return decoder(model, params, cache, prompts(5, 3, 13), max_new=24, sampling=rows, key=KEY, **more)


@pytest.mark.parametrize("heat", [0.0, 1.3], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("cache", "kind"), [*(("dense", kind) for kind in DRAFTS), ("paged", "lookup"), ("quantized", "model")]
)
def test_the_tokens_of_generate(cache, kind, heat):
    strategy, draft = CACHES[cache], DRAFTS[kind]()
    free = decode(kvjax.generate, strategy, heat)
    out = decode(kvjax.speculate, strategy, heat, draft=draft, costs=[1.0] * len(widths(draft)))
    for name in ("tokens", "lengths", "reason"):
        np.testing.assert_array_equal(getattr(out, name), getattr(free, name))
    np.testing.assert_allclose(out.logprobs, free.logprobs, atol=2e-4)
    assert out.speculated.proposed.sum() > 0
    assert kind == "heads" or out.speculated.accepted.sum() > 0  # heads that have learnt nothing
    assert len(set(out.reason.tolist())) > 1


@pytest.mark.parametrize("heat", [0.0, 1.3], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_target_guesses_within_the_grammar(heat):
    model, params = tiny()
    draft = DraftModel(model, params, k=3)
    out = decode(kvjax.speculate, Dense(), heat, draft=draft, costs=[1.0] * 3)
    missed = out.speculated.proposed - out.speculated.accepted
    assert (missed <= 3).all(), missed  # what was guessed beyond an end


def test_without_the_state_it_guesses_worse(monkeypatch):
    """Or the test above would prove nothing."""
    model, params = tiny()
    right = state.View
    monkeypatch.setattr(state, "View", lambda **view: right(**{**view, "ruled": None}))
    jax.clear_caches()
    out = decode(kvjax.speculate, Dense(), 0.0, draft=DraftModel(model, params, k=3), costs=[1.0] * 3)
    jax.clear_caches()
    assert (out.speculated.proposed - out.speculated.accepted)[jnp.array([0, 2])].sum() > 6
