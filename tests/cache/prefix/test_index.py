import copy
import itertools
from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.prefix import POLICIES, PrefixStore, Tally, find
from kvjax.cache.prefix.index import ROOT, Turns, above, block_name, grow, shrink
from tests.tiny import LLAMA

PAGE = 4


def empty(policy="lru", most=20):
    return PrefixStore(LLAMA, PAGE, most, POLICIES[policy], Turns(POLICIES[policy].init(most)))


def kept(store, *texts):
    pages = itertools.count(len(store.blocks))
    for i, text in enumerate(texts):
        store = grow(store, text, [next(pages) for _ in range(len(text) // PAGE)], float(i), len(text), None)
    return store


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=17), max_size=6), st.lists(st.integers(0, 1), max_size=17))
def test_what_is_found_is_the_longest_kept_start(texts, prompt):
    store = kept(empty(most=40), *texts)
    path, covered = find(store, prompt)
    whole = [text[: len(text) // PAGE * PAGE] for text in texts]
    common = [len(commonprefix([text, prompt])) for text in whole]
    assert covered == min(max(common, default=0), max(len(prompt) - 1, 0))
    assert len(path) == -(-covered // PAGE)
    text = [token for name in path for token in store.blocks[name].tokens]
    assert text[:covered] == prompt[:covered]
    assert [store.blocks[name].parent for name in path] == [ROOT, *path][: len(path)]


def test_a_text_kept_again_takes_no_new_page():
    store = kept(empty(), range(8), range(12))
    assert [block.page for block in store.blocks.values()] == [0, 1, 4]
    assert store.tally.kept == 3


def test_too_many_blocks_are_evicted_by_policy_but_not_those_just_kept():
    store = kept(empty(most=3), range(8), range(100, 108))
    assert store.tally.evicted == 1
    assert find(store, list(range(100, 109)))[1] == 8
    assert find(store, list(range(9)))[1] == 4
    store = kept(store, range(200, 240))  # ten blocks, of which three may be kept
    assert len(store.blocks) == 3 and find(store, list(range(200, 240)))[1] == 12


def test_a_donated_store_is_refused_and_a_copy_is_not():
    old = kept(empty(), range(8))
    spare = copy.deepcopy(old)
    new = shrink(old, 1, frozenset())
    with pytest.raises(ValueError, match=r"`store` was donated to a later one \(turn 1 of 2\)"):
        shrink(old, 1, frozenset())
    assert len(new.blocks) == 1 and len(shrink(spare, 2, frozenset()).blocks) == 0
    assert len(new.blocks) == 1


def test_blocks_in_use_come_with_those_before_them():
    store = kept(empty(), range(12), [*range(4), *range(50, 54)])
    first, second, third, other = store.blocks
    assert above(store, {2}) == {first, second, third}
    assert above(store, {store.blocks[other].page}) == {first, other}
    assert above(store, {-1, 99}) == frozenset()


def test_names_depend_on_all_before_and_stamps_on_pages():
    names = {block_name(parent, (a, b)) for parent in range(20) for a in range(20) for b in range(20)}
    assert len(names) == 8000 and ROOT not in names
    one = kept(empty(), range(8))
    moved = grow(empty(), range(8), [1, 0], 0.0, 8, None)
    assert one.stamp != moved.stamp != 0 == empty().stamp
    assert one.stamp == kept(empty(), range(8)).stamp


def test_two_blocks_of_one_name_are_never_taken_for_each_other(monkeypatch):
    monkeypatch.setattr("kvjax.cache.prefix.index.block_name", lambda parent, tokens: 7)
    store = kept(empty(), [1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8])
    assert [block.tokens for block in store.blocks.values()] == [(1, 2, 3, 4)]
    assert find(store, [5, 6, 7, 8, 9]) == ((), 0)


def test_time_never_runs_back():
    store = grow(empty("predictive"), range(4), [0], 9.0, 4, None)
    assert grow(store, range(4), [0], 3.0, 4, None).time == 9.0


def test_hit_rate():
    assert Tally().hit_rate == 0.0
    assert Tally(asked=8, found=2).hit_rate == 0.25
