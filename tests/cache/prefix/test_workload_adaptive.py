from dataclasses import dataclass

import pytest

from kvjax.cache.prefix import AdaptiveLru, Lru, Play, Predictive, WorkloadAdaptive, play, replay
from kvjax.cache.prefix.forest import fell, leaf, plant
from tests.cache.prefix.traces import chat

TRACE = chat(2, 700, goes_on=0.6, pause=20.0)


@dataclass(frozen=True)
class Newest(AdaptiveLru):
    """A bad policy: the block held shortest leaves."""

    def touch(self, state, access):
        plant(state.forest, access.path)
        return state

    def victim(self, state, pinned=frozenset()):
        block = leaf(state.forest, reversed(list(state.forest.parent)), pinned)
        fell(state.forest, block)
        return block, state


@pytest.mark.parametrize("policy", [Lru(), AdaptiveLru(), Predictive()], ids=lambda p: type(p).__name__)
def test_alone_a_policy_is_followed_block_by_block(policy):
    assert list(replay(WorkloadAdaptive((policy,)), 120, TRACE)) == list(replay(policy, 120, TRACE))


def test_a_better_policy_takes_the_lead_and_the_store_becomes_its_own():
    game = Play(WorkloadAdaptive((Newest(), Lru())), 120)
    hits = [play(game, access)[0] for access in TRACE]
    assert game.state.leader == 1
    assert set(game.held) == game.state.shadows[1].held == set(game.state.forest.parent)
    assert hits[-300:] == list(replay(Lru(), 120, TRACE))[-300:]
    assert sum(hits) > 1.5 * sum(replay(Newest(), 120, TRACE))


def test_a_good_leader_stays():
    game = Play(WorkloadAdaptive((Lru(), Newest())), 120)
    leaders = {(play(game, access), game.state.leader)[1] for access in TRACE}
    assert leaders == {0}


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`policies` must name at least one policy"):
        WorkloadAdaptive(())
    with pytest.raises(ValueError, match="`half_life` must be positive, got 0"):
        WorkloadAdaptive(half_life=0.0)
    with pytest.raises(ValueError, match="`deviations` must be positive, got -1"):
        WorkloadAdaptive(deviations=-1.0)


def test_being_ahead_by_chance_is_not_enough():
    game = Play(WorkloadAdaptive((Newest(), Lru()), deviations=1e9), 120)
    for access in TRACE:
        play(game, access)
    assert game.state.leader == 0 and game.state.ahead[1] > 0
