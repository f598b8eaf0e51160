"""Trained drafts: what they guess from, how they learn, and how they are kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.block import Norm
from kvjax.cache import Dense
from kvjax.draft import Chain, EarlyExit, Heads, PromptLookup, distill, load_draft, save_draft, speculate
from kvjax.draft.turns import reduced
from kvjax.model import with_hidden
from tests.draft.test_drafts import view
from tests.tiny import prompts, tiny

IDS = np.array([3, 8, 9, 17, 24, 25, 33, 40, 52, 60], np.int32)
ALL = np.arange(61, dtype=np.int32)
EAGER = [1.0, 1.0, 1.0]


def heads(family="llama", ids=ALL, k=3):
    model, params = tiny(family)
    return Heads.of(model, params, trained=Heads.fresh(model, params, ids, jax.random.key(2)), k=k)


def early(family="llama", ids=ALL, k=3):
    model, params = tiny(family)
    return EarlyExit.of(model, params, layers=1, exit=EarlyExit.fresh(model, params, ids), k=k)


MAKE = {"heads": heads, "early-exit": early}


def decoded(decoder, tokens, lengths=None, family="llama", **settings):
    model, params = tiny(family)
    cache = Dense().init(model, batch=len(tokens), capacity=80)
    return decoder(model, params, cache, tokens, lengths, **settings)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mistral"))]
)
def test_every_family_decodes_the_same(kind, family):
    """Soft caps, scaled embeddings, learned positions, windows, and a head apart from the embedding."""
    tokens = prompts(5, 2, 7)
    free = decoded(kvjax.generate, tokens, family=family, max_new=12)
    out = decoded(speculate, tokens, family=family, max_new=12, draft=MAKE[kind](family), costs=EAGER)
    np.testing.assert_array_equal(out.tokens, free.tokens)
    assert (out.speculated.proposed > 0).all()


@pytest.mark.parametrize("kind", MAKE)
def test_rows_that_end_at_different_steps_and_inside_a_draft(kind):
    tokens, lengths = prompts(5, 3, 13), jnp.array([13, 4, 1])
    free = np.asarray(decoded(kvjax.generate, tokens, lengths, max_new=16).tokens)
    rows = [Sampling(stop=[int(free[0, 5])]), Sampling(), Sampling(limit=7)]
    settings = {"max_new": 16, "sampling": rows}
    free = decoded(kvjax.generate, tokens, lengths, **settings)
    out = decoded(speculate, tokens, lengths, draft=MAKE[kind](), costs=EAGER, **settings)
    for name in ("tokens", "lengths", "reason"):
        np.testing.assert_array_equal(getattr(out, name), getattr(free, name))
    assert len(set(out.lengths.tolist())) == 3


@pytest.mark.parametrize("kind", MAKE)
def test_draws_are_those_of_generate(kind):
    settings = {"max_new": 14, "key": jax.random.key(3), "sampling": Sampling(temperature=1.2)}
    tokens = prompts(4, 2, 5)
    free = decoded(kvjax.generate, tokens, **settings)
    out = decoded(speculate, tokens, draft=MAKE[kind](), costs=EAGER, **settings)
    np.testing.assert_array_equal(out.tokens, free.tokens)


def test_only_the_drafts_own_tokens_are_guessed_each_at_its_place():
    config = replace(tiny()[0].config, logit_softcap=30.0)
    hidden, head = (jax.random.normal(jax.random.key(i), (n, 32)) for i, n in ((0, 2), (1, 61)))
    full = reduced(hidden, head, jnp.asarray(ALL), config)
    some = reduced(hidden, head[IDS], jnp.asarray(IDS), config)
    np.testing.assert_allclose(some[:, IDS], full[:, IDS], rtol=1e-5)
    assert (np.delete(np.asarray(some), IDS, axis=1) == -np.inf).all()
    assert np.abs(full).max() <= 30
    assert distill.frequent([[5, 5, 7], [7, 7, 9, 2]], 3, 61, always=[60]).tolist() == [5, 7, 60]


def test_nothing_is_asked_of_the_target_where_no_draft_wants_it():
    assert Chain((PromptLookup(), heads())).wants_hidden and not Chain((PromptLookup(),)).wants_hidden
    tokens = prompts(5, 2, 7)
    free = decoded(kvjax.generate, tokens, max_new=12)
    out = decoded(speculate, tokens, max_new=12, draft=Chain((PromptLookup(k=3), heads())), costs=EAGER)
    np.testing.assert_array_equal(out.tokens, free.tokens)


@pytest.mark.parametrize("costs", [EAGER, [1.0, 99.0, 99.0]], ids=["guessing", "idle"])
def test_hidden_states_that_come_to_a_draft_are_the_models_at_those_tokens(costs, monkeypatch):
    """Whatever was checked at once, and however many steps went by: none but the newest token's is missing."""
    model, params = tiny()
    tokens, seen = prompts(5, 2, 7), []
    right = Heads.observe

    def observe(self, own, view):
        after = right(self, own, view)
        looked = after.hidden, after.start, view.text, view.length, view.fresh
        jax.debug.callback(lambda *x: seen.append(x), *looked, ordered=True)
        return after

    monkeypatch.setattr(Heads, "observe", observe)
    jax.clear_caches()
    good = EarlyExitLike(heads())
    out = decoded(speculate, tokens, max_new=30, draft=good, costs=costs)
    jax.effects_barrier()
    jax.clear_caches()
    assert (out.speculated.rounds[0] < out.speculated.rounds.sum()) == (costs == EAGER)
    assert (max(x[4].max() for x in seen) > 4) == (costs != EAGER)
    hidden, start, text, length, _ = (np.asarray(x) for x in seen[-1])
    whole = with_hidden(model, params, jnp.asarray(text), None, None)[2]
    assert (start == 7).all() and (length > 24).all()
    for row in range(2):
        part = slice(start[row], length[row] - 1)
        np.testing.assert_allclose(hidden[row, part], whole[row, part], atol=2e-4)


def EarlyExitLike(draft):
    """A chain in which the early exit guesses, and the heads only watch."""
    return Chain((early(), draft))


def text(rows=8, new=24, layer=None, **settings):
    model, params = tiny()
    return distill.answers(model, params, np.asarray(prompts(9, rows, 5)).tolist(), new=new, layer=layer, **settings)


def test_answers_are_those_of_generate_with_what_the_target_saw_and_said():
    """Prompts of several lengths, a row that ends early, and one that draws."""
    model, params = tiny()
    tokens = [np.asarray(prompts(i, 1, n))[0].tolist() for i, n in enumerate((5, 3, 9))]
    free = np.asarray(decoded(kvjax.generate, tokens, max_new=24).tokens)
    sampling = [Sampling(), Sampling(stop=[int(free[1, 6])]), Sampling(temperature=1.0)]
    out = decoded(kvjax.generate, tokens, max_new=24, sampling=sampling, key=jax.random.key(1))
    got = distill.answers(model, params, tokens, new=24, sampling=sampling, key=jax.random.key(1), layer=1)
    assert got.tokens.shape == (3, 25) and got.length.tolist() == out.lengths.tolist() == [24, 7, 24]
    for row, (prompt, n) in enumerate(zip(tokens, got.length, strict=True)):
        np.testing.assert_array_equal(got.tokens[row, : n + 1], [prompt[-1], *np.asarray(out.tokens)[row, :n]])
        whole = jnp.asarray([prompt[:-1] + got.tokens[row, :n].tolist()])
        logits, _, hidden, layers = with_hidden(model, params, whole, None, None)
        first = len(prompt) - 1
        np.testing.assert_array_equal(got.best[row, :n], logits[0, first:].argmax(-1))
        np.testing.assert_allclose(got.hidden[row, :n], hidden[0, first:], atol=5e-3)
        np.testing.assert_allclose(got.early[row, :n], layers[0][0, first:], atol=2e-2, rtol=2e-3)
        np.testing.assert_allclose(got.mass[row, :n], jax.nn.logsumexp(logits, -1)[0, first:], rtol=1e-3)


def test_a_fitted_layer_is_the_best_linear_guess():
    """Its errors have nothing in common with what it sees, and its block adds nothing yet."""
    model, params = tiny()
    got, draft = text(rows=32, new=40, sampling=Sampling(temperature=1.0), key=jax.random.key(0)), heads()
    fixed = distill.fixed(model, params, draft.trained)
    layer = distill.fitted(model, draft.trained, fixed, got)["layer"]
    hidden, embedded = jnp.asarray(got.hidden[:, :-2], jnp.float32), params["embed"][got.tokens[:, 1:-1]]
    both = jnp.concatenate(
        [Norm(model.config).apply({"params": draft.trained["layer"][f"{name}_norm"]}, x) for name, x in
         (("hidden", hidden), ("embed", embedded))], -1
    )  # fmt: skip
    wanted = jnp.asarray(got.hidden[:, 1:-1], jnp.float32) / params["norm"]["scale"][None, None]
    error = wanted - both @ layer["fuse"]["kernel"].T
    common = jnp.einsum("bti,btj->ij", both, error) / error.size
    assert jnp.abs(common).max() < 0.02 * jnp.abs(jnp.einsum("bti,btj->ij", both, wanted) / error.size).max()
    lesson, weights = distill.HeadsLesson(model), {"layer": layer, "head": draft.trained["head"]}
    (state,) = lesson.states(weights, fixed["embed"], got, 1)
    linear = both @ layer["fuse"]["kernel"].T
    expected = Norm(model.config).apply({"params": params["norm"]}, linear)
    np.testing.assert_allclose(state[:, :-1], expected, atol=1e-4)


def test_steps_in_training_are_those_of_guessing():
    """The states of each step at a place are what the draft makes there when it goes on from its own."""
    draft, got = heads(k=3), text(rows=2)
    lesson = distill.HeadsLesson(tiny()[0])
    states = lesson.states(draft.trained, draft.embed, got, 3)
    at = 9
    own = draft.init(2, 32)
    own = replace(
        own,
        hidden=own.hidden.at[:, :25].set(jnp.asarray(got.hidden, jnp.float32)),
        start=jnp.zeros(2, jnp.int32),
    )
    some = jnp.full(2, at, jnp.int32)
    now = view(got.tokens.tolist())
    _, own = draft.take(own, now, some, 16)
    np.testing.assert_allclose(own.last, states[0][:, at - 1], atol=1e-4)
    for step in (1, 2):
        _, own = draft.feed(own, jnp.asarray(got.tokens)[:, at + step], some * 0 + 1)
        np.testing.assert_allclose(own.last, states[step][:, at - 1 + step], atol=1e-4)


@pytest.mark.parametrize("kind", MAKE)
def test_training_makes_guesses_right(kind, tmp_path):
    model, params = tiny()
    got, draft = text(rows=8, layer=1), MAKE[kind]()
    lesson = distill.HeadsLesson(model, 2) if kind == "heads" else distill.ExitLesson(model)
    fixed = distill.fixed(model, params, draft.trained)
    course = distill.begin(draft.trained, 1e-2, 120)
    before = distill.accepted(lesson, course.weights, fixed, got, k=3)
    for step in range(120):
        course, _ = distill.update(lesson, course, fixed, got, rate=1e-2, total=120)
        if step == 59:
            kvjax.save(tmp_path / "course", course)
    after = distill.accepted(lesson, course.weights, fixed, got, k=3)
    assert (np.diff(after) <= 1e-6).all() and after.sum() > before.sum() + 0.5, (before, after)

    back = kvjax.restore(tmp_path / "course", distill.begin(draft.trained, 1e-2, 120))
    for _ in range(60):
        back, _ = distill.update(lesson, back, fixed, got, rate=1e-2, total=120)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(course), strict=True):
        np.testing.assert_array_equal(a, b)

    ids = draft.trained["ids"]
    if kind == "heads":
        learnt = Heads.of(model, params, trained=course.weights | {"ids": ids}, k=3)
    else:
        learnt = EarlyExit.of(model, params, layers=1, exit=course.weights | {"ids": ids}, k=3)
    tokens = np.asarray(prompts(9, 8, 5))
    free = decoded(kvjax.generate, tokens, max_new=24)
    old, new = (decoded(speculate, tokens, max_new=24, draft=d, costs=EAGER) for d in (draft, learnt))
    np.testing.assert_array_equal(new.tokens, free.tokens)
    rate = [int(o.speculated.accepted.sum()) / int(o.speculated.proposed.sum()) for o in (old, new)]
    assert rate[1] > rate[0] + 0.15, rate

    save_draft(tmp_path / "draft", learnt)
    again = load_draft(tmp_path / "draft", model, params)
    assert jax.tree.structure(again) == jax.tree.structure(learnt)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(learnt), strict=True):
        np.testing.assert_array_equal(a, b)
    assert load_draft(tmp_path / "draft", model, params, k=2).k == 2


def test_the_layer_is_computed_again_in_the_backward_pass():
    model, params = tiny()
    draft, got = heads(), text(rows=2)
    lesson, fixed = distill.HeadsLesson(model, 2), distill.fixed(model, params, draft.trained)
    weights = {name: x for name, x in draft.trained.items() if name != "ids"}
    program = str(jax.make_jaxpr(jax.grad(lesson.loss))(weights, fixed, got))
    assert program.count("remat") >= 2
    assert "remat" not in str(
        jax.make_jaxpr(jax.grad(distill.ExitLesson(model).loss))(
            {"norm": params["norm"], "head": fixed["head"]}, fixed, text(rows=2, layer=1)
        )
    )


@pytest.mark.parametrize("kind", MAKE)
def test_a_draft_of_another_model_is_refused(kind, tmp_path):
    model, _ = tiny()
    draft = MAKE[kind]()
    save_draft(tmp_path / "draft", draft)
    other, others = tiny("qwen3")
    with pytest.raises(ValueError, match="was trained for another model: its family, kv_heads, qk_norm differ"):
        load_draft(tmp_path / "draft", other, others)
    with pytest.raises(ValueError, match="it was trained for another model: its family, kv_heads, qk_norm differ"):
        decoded(speculate, prompts(1, 1, 4), family="qwen3", max_new=4, draft=draft)


def test_what_is_no_draft_is_refused(tmp_path, unchecked):
    model, params = tiny()
    with pytest.raises(FileNotFoundError, match="load_draft: no draft at"):
        load_draft(tmp_path, model, params)
    (tmp_path / "draft.json").write_text('{"format": "kvjax-draft-9"}')
    with pytest.raises(ValueError, match="not what save_draft writes .*kvjax-draft-9"):
        load_draft(tmp_path, model, params)
    with pytest.raises(ValueError, match="`draft` must be Heads or EarlyExit, got PromptLookup"):
        save_draft(tmp_path / "x", PromptLookup())
    with pytest.raises(ValueError, match=r"`layers` must be in \[1, 1\], below the target's, got 2"):
        EarlyExit.of(model, params, layers=2, exit=EarlyExit.fresh(model, params, ALL))
    with pytest.raises(ValueError, match=r"`ids` must be a list of tokens in \[0, 61\)"):
        Heads.fresh(model, params, np.array([3, 61], np.int32), jax.random.key(0))
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        heads(k=0)
