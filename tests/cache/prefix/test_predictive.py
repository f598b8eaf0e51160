import dataclasses

import pytest

from kvjax.cache.prefix import Access, Lru, Predictive, replay
from tests.cache.prefix.traces import SYSTEM, chat

TRACE = chat(1, 600, goes_on=0.4, pause=120.0)
SHARED = len(SYSTEM) * (len(TRACE) - 1)


@pytest.mark.parametrize("prior", ["chat", "none"])
def test_it_learns_which_conversations_go_on(prior):
    learned, recent = (sum(replay(policy, 150, TRACE)) for policy in (Predictive(prior), Lru()))
    assert learned - SHARED > 1.5 * (recent - SHARED)


def test_what_it_learns_is_in_the_answers_here():
    blind = [dataclasses.replace(access, answer=None) for access in TRACE]
    policy = Predictive("none")
    assert sum(replay(policy, 150, blind)) < sum(replay(policy, 150, TRACE))


def test_a_next_turn_is_told_from_a_shared_beginning():
    policy = Predictive()
    state = policy.init(1000)
    for number in range(20):
        state = policy.touch(state, Access((0, 1, 100 + number), float(number), 1500))
    assert [chain.turn for chain in state.chains.values()][-10:] == [1] * 10
    state = policy.touch(state, Access((0, 1, 119, 200), 30.0, 2000))
    state = policy.touch(state, Access((0, 1, 119, 201, 202), 60.0, 2500))
    assert [chain.turn for chain in state.chains.values()][-2:] == [2, 3]
    assert state.chains[20].over and not state.chains[21].over


def test_last_blocks_that_never_return_leave_first():
    policy = Predictive()
    state = policy.init(10_000)
    for access in TRACE:
        state = policy.touch(state, access)
    ends = {access.path[-1] for access in TRACE}
    left = []
    for _ in range(50):
        block, state = policy.victim(state)
        left.append(block)
    assert state.ends[1] / state.ends[0] < 0.05 and set(left) <= ends


def test_before_anything_is_seen_the_longest_untouched_leaves():
    policy = Predictive("none")
    state = policy.init(100)
    for number in range(20):
        state = policy.touch(state, Access((number,), 5.0 * number, 500))
    left = []
    for _ in range(20):
        block, state = policy.victim(state)
        left.append(block)
    assert left == list(range(20))


def test_little_memory_is_enough_to_go_on():
    policy = Predictive(remembered=64)
    state = policy.init(50)
    for access in TRACE:
        state = policy.touch(state, access)
        while len(state.forest.parent) > 50:
            _, state = policy.victim(state, frozenset(access.path))
    assert len(state.chains) < 4 * 64 and len(state.owner) < 4 * 64 * 20
    assert state.forest.parent.keys() <= state.owner.keys()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`prior` must be one of chat, none, got 'no'"):
        Predictive("no")
    with pytest.raises(ValueError, match="`remembered` must be at least 64 prompts, got 3"):
        Predictive(remembered=3)
