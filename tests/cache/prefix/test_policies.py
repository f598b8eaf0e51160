"""What every policy must do, crossed with made-up traces."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.prefix_baselines import Belady, Lfu, S3Fifo
from kvjax.cache.prefix import POLICIES, Access, Play, match, play, replay
from tests.cache.prefix.traces import chat

TRACE = chat(0, 200, sudden=0.2)
ALL = {**POLICIES, "lfu": Lfu(), "lfu_da": Lfu(aging=True), "s3_fifo": S3Fifo(), "belady": Belady.of(TRACE)}
CAPACITY = 60


@pytest.fixture(params=ALL, ids=str)
def policy(request):
    return ALL[request.param]


def serve(state, policy, held, access, capacity, pinned=frozenset()):
    """One prompt by hand: every victim is held, not in use, and continued by nothing that is held."""
    state = policy.touch(state, access)
    parents = set(access.path) | held.keys()
    new = [block for block in access.path if block not in held]
    for _ in range(len(held) + len(new) - capacity):
        block, state = policy.victim(state, pinned | set(access.path))
        assert block in held and block in parents and block not in access.path and block not in pinned
        assert block not in held.values(), "a block left before the one that continues it"
        del held[block]
    held.update({block: before for before, block in zip((None, *access.path), access.path, strict=False)})
    return state


def test_victims_are_held_unpinned_ends(policy):
    state, held = policy.init(CAPACITY), {}
    for access in TRACE:
        state = serve(state, policy, held, access, CAPACITY)
        assert len(held) <= CAPACITY


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), capacity=st.integers(40, 90))
def test_other_prompts_in_use_stay(name, seed, capacity):
    state, held, policy = POLICIES[name].init(capacity), {}, POLICIES[name]
    running: list[Access] = []
    for access in (access for access in chat(seed, 60, sudden=0.3) if len(access.path) <= capacity):
        running = [*running[-1:], access]
        pinned = {block for other in running for block in other.path}
        pinned = frozenset(block for block in pinned if block in held and len(pinned) <= capacity)
        state = serve(state, policy, held, access, capacity, pinned)


def test_a_copy_or_a_saved_state_goes_on_alike(policy):
    game = Play(policy, CAPACITY)
    for access in TRACE[:100]:
        play(game, access)
    others = [copy.deepcopy(game), pickle.loads(pickle.dumps(game))]
    rest = [play(game, access) for access in TRACE[100:]]
    for other in others:
        assert [play(other, access) for access in TRACE[100:]] == rest


def test_two_replays_are_equal_and_share_nothing(policy):
    first = list(replay(policy, CAPACITY, TRACE))
    assert list(replay(policy, CAPACITY, TRACE)) == first


def test_with_room_for_all_nothing_leaves(policy):
    blocks = {block for access in TRACE for block in access.path}
    seen: set[int] = set()
    expected = []
    for access in TRACE:
        expected.append(match(seen, access.path))
        seen.update(access.path)
    assert list(replay(policy, len(blocks), TRACE)) == expected


def test_none_beats_the_optimum(policy):
    best = sum(replay(ALL["belady"], CAPACITY, TRACE))
    assert sum(replay(policy, CAPACITY, TRACE)) <= best


def test_without_room_or_victims_is_an_error(policy):
    with pytest.raises(ValueError, match="`capacity` must be at least 1 block, got 0"):
        policy.init(0)
    state = policy.touch(policy.init(50), TRACE[0])
    with pytest.raises(ValueError, match="expected a held block that is not `pinned`"):
        policy.victim(state, frozenset(TRACE[0].path))


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`capacity` must hold a prompt of 3 blocks, got 2"):
        list(replay(POLICIES["lru"], 2, [Access((1, 2, 3), 0.0, 3)]))


def test_wrong_accesses_are_refused():
    with pytest.raises(ValueError, match="`path` must name at least one block"):
        Access((), 0.0, 0)
    with pytest.raises(ValueError, match="`block_bytes` must be positive, got 0"):
        Access((1,), 0.0, 1, block_bytes=0.0)
