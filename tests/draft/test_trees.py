"""Guesses that branch: the tokens of generate, by whichever branch is right, with nothing left of the others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense
from kvjax.draft import Branches, Chain, PromptLookup, plan, rounds, speculate
from kvjax.draft.tree import Tree, hopes, merged, paths
from kvjax.pytree import pytree, static
from tests.draft.test_drafts import guesses
from tests.draft.test_speculation import KEY, SETTINGS, TOKENS, Told, run, same, told
from tests.strategies import CACHES, CHUNKED, crossed
from tests.tiny import prompts, tiny

EAGER = [1.0] * 5


@pytree
class Crown:
    """Each right guess beside a wrong sister before it that has a child: of seven nodes, the right are 2, 4 and 6."""

    told: Told
    shift: int = static(default=1)

    @property
    def most(self):
        return 7

    @property
    def makes_trees(self):
        return True

    def check(self, target):
        pass

    def init(self, batch, size):
        return None

    def propose(self, own, view, want):
        right, count, _ = self.told.propose(None, view, jnp.int32(3))
        off = (right + self.shift) % 61
        columns = off[:, 0], right[:, 1], right[:, 0], off[:, 1], right[:, 1], right[:, 2], right[:, 2]
        parent = jnp.array([-1, 0, -1, 2, 2, 3, 4], jnp.int32)
        guess = jnp.stack(columns, axis=1)
        return Tree(guess, jnp.tile(parent[None], (guess.shape[0], 1))), jnp.where(want > 0, count * 0 + 7, 0), None

    def observe(self, own, view):
        return None


def alike(out, free):
    for a, b in zip(jax.tree.leaves(out.cache), jax.tree.leaves(free.cache), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=2e-4)
        else:
            assert (a == b).mean() > 0.99 if a.dtype == jnp.uint8 else (a == b).all()  # a code may round otherwise


@pytest.fixture
def place_for_all(monkeypatch):
    """Calls have a place for every guess, as on a GPU."""
    for module in (plan, rounds):
        monkeypatch.setattr(module, "tokens_checked", lambda batch, width: batch * (width + 1))
    rounds.advance.clear_cache()
    yield
    rounds.advance.clear_cache()


@pytest.mark.parametrize(
    ("cache", "sampling"),
    [*crossed(CACHES, "greedy", core=["Dense()", "Paged(page=4, pool=24)"]), ("Dense()", "sampled")],
)
def test_the_right_branch_is_kept_and_nothing_of_the_others(cache, sampling, place_for_all):
    one = {"lengths": None, "tokens": TOKENS[:, :1]} if cache in CHUNKED else {}
    settings = {"max_new": 20, "key": KEY, "sampling": SETTINGS[sampling], **one}  # so many that every slot is filled
    free = run(kvjax.generate, cache, **settings)
    out = run(speculate, cache, draft=Crown(told(free, wrong=[5, 99, 11])), costs=[1.0] * 4, **settings)
    same(out, free)
    assert (np.asarray(out.speculated.accepted) >= [2, 8, 5]).all()
    if "Paged" not in cache:
        alike(out, free)
    rest = [kvjax.generate(*tiny(), o.cache, o.last, max_new=4) for o in (out, free)]
    same(*rest)


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mistral"))]
)
def test_windows_soft_caps_and_learned_positions(family):
    model, params = tiny(family)
    tokens = prompts(5, 2, 7)
    free = kvjax.generate(model, params, Dense().init(model, batch=2, capacity=48), tokens, max_new=20)
    draft, cache = Crown(told(free)), Dense().init(model, batch=2, capacity=48)
    out = speculate(model, params, cache, tokens, draft=draft, max_new=20, costs=[1.0] * 4)
    same(out, free)
    assert out.speculated.rounds.sum() == 5
    alike(out, free)


@pytest.mark.parametrize("broken", ["mask", "position"])
def test_a_wrong_mask_or_position_is_noticed(broken, monkeypatch):
    """That the second branch is right is found by a model that sees the way to it, each token at its place."""
    free = run(kvjax.generate, max_new=24)
    right = kvjax.cache.ahead.Ahead.positions
    if broken == "mask":  # every node sees all nodes before it, as in a chain
        monkeypatch.setattr(
            "kvjax.cache.ahead._along",
            lambda q, k, v, positions, valid, mask, path: kvjax.cache.ahead.attend(
                q, *(kvjax.cache.ahead.by_head(x) for x in (k, v)), positions, jnp.where(valid, positions, -1), mask
            ),
        )
    else:
        monkeypatch.setattr(
            kvjax.cache.ahead.Ahead,
            "positions",
            lambda self, cache, width: right(self, replace(cache, shared=replace(cache.shared, path=None)), width),
        )
    jax.clear_caches()
    out = run(speculate, draft=Crown(told(free)), costs=[1.0] * 4, max_new=24)
    jax.clear_caches()
    assert (np.asarray(out.tokens) != np.asarray(free.tokens)).any()


@pytest.mark.parametrize("at", range(2, 8))
def test_an_end_inside_a_branch(at):
    whole = run(kvjax.generate, max_new=16)
    tokens = np.asarray(whole.tokens)
    rows = [Sampling(stop=[int(tokens[0, at])]), Sampling(limit=at), Sampling()]
    settings = {"max_new": 16, "sampling": rows, "capacity": 13 + 15}
    free = run(kvjax.generate, **settings)
    out = run(speculate, draft=Crown(told(whole)), costs=[1.0] * 4, **settings)
    same(out, free)
    assert out.cache.length.tolist() == free.cache.length.tolist()


def test_parents_that_come_later_lose_speed_and_no_token():
    @pytree
    class Backwards(Crown):
        def propose(self, own, view, want):
            right, count, _ = self.told.propose(None, view, jnp.int32(3))
            guess = jnp.concatenate([right[:, 1:], right[:, :1]], axis=1)
            guess = jnp.pad(guess, ((0, 0), (0, 4)))
            parent = jnp.array([2, 0, -1, 9, -5, 6, 5], jnp.int32)
            return Tree(guess, jnp.tile(parent[None], (guess.shape[0], 1))), jnp.where(want > 0, count, 0), None

    free = run(kvjax.generate, max_new=24)
    same(run(speculate, draft=Backwards(told(free)), costs=[1.0] * 4, max_new=24), free)


def test_equal_beginnings_are_merged():
    blank = jnp.full((1, 9), -1, jnp.int32)
    tree, count = Tree(blank, blank), jnp.zeros(1, jnp.int32)
    for chain in ([5, 6, 7], [5, 8, 7], [9, 6, 7]):
        tree, count = merged(tree, count, jnp.array([chain]), jnp.array([3 if chain[0] == 5 else 1]))
    assert tree.guess[0].tolist() == [5, 6, 7, 8, 7, 9, -1, -1, -1] and count.tolist() == [6]
    assert tree.parent[0].tolist() == [-1, 0, 1, 0, 3, -1, -1, -1, -1]


def test_lookup_passes_over_what_was_guessed_before():
    text = [1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 8, 9, 1, 2]
    assert guesses(PromptLookup(k=2), [text]) == [[8, 9]]
    assert guesses(PromptLookup(k=2, skip=1), [text]) == [[5, 7]]
    assert guesses(PromptLookup(k=2, skip=2), [text]) == [[]]


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_branches_of_lookup_find_more_than_the_first(sampling):
    text = jnp.array([[1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 8, 9, 1, 2]] * 2)
    settings = {"tokens": text, "lengths": None, "max_new": 40, "key": KEY, "sampling": SETTINGS[sampling]}
    free = run(kvjax.generate, **settings)
    lookups = [PromptLookup(k=3, shortest=1, skip=skip) for skip in range(3)]
    out = run(speculate, draft=Branches(tuple(lookups)), costs=EAGER, **settings)
    same(out, free)
    alone = run(speculate, draft=lookups[0], costs=[1.0] * 3, **settings)
    assert int(out.speculated.rounds.sum()) <= int(alone.speculated.rounds.sum())


def test_ways_and_hopes_of_a_tree():
    parent = jnp.array([[-1, 0, -1, 0]])
    path = paths(parent)
    assert path[0].tolist() == [
        [0, -1, -1, -1, -1],
        [0, 1, -1, -1, -1],
        [0, 1, 2, -1, -1],
        [0, 3, -1, -1, -1],
        [0, 1, 4, -1, -1],
    ]
    np.testing.assert_allclose(hopes(jnp.array([0.5]), parent, path), [[0.5, 0.25, 0.25, 0.125]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: paths(jnp.array([[-1, 1]])),
            r"`parent` must be -1 or the index of an earlier guess, got \[\[-1, 1\]\]",
        ),
        (lambda: paths(jnp.array([[-2]])), "`parent` must be -1 or the index of an earlier guess"),
        (lambda: Branches(()), "Branches: `drafts` must name at least one"),
        (lambda: Chain((Branches((PromptLookup(),)),)), "Chain: `drafts` must guess one token after the other, got Br"),
        (lambda: PromptLookup(skip=-1), "`skip` must be at least 0, a whole number, got -1"),
    ],
)
def test_what_is_no_tree_is_refused_by_name(make, words, unchecked):
    with pytest.raises(ValueError, match=words):
        make()
