"""Policies and their states, written as plain data."""

import json
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest

from kvjax.cache.prefix import POLICIES, Lru, Play, play
from kvjax.cache.prefix.codec import decode, encode
from tests.cache.prefix.traces import chat

OURS = {"kvjax.cache.prefix"}


@dataclass(frozen=True)
class Strange:
    """A policy of somebody else's."""

    what: object


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_read_back_goes_on_alike(name):
    trace, arrays = chat(0, 160, sudden=0.2), []
    game = Play(POLICIES[name], 60)
    for access in trace[:100]:
        play(game, access)
    text = json.dumps([encode(game.policy, arrays), encode(game.state, arrays), encode(game.held, arrays)])
    policy, state, held = decode(["tuple", json.loads(text)], [array.copy() for array in arrays], OURS)
    assert policy == game.policy
    assert type(getattr(state, "order", OrderedDict())) is OrderedDict
    other = Play(policy, 60, state, held)
    rest = [play(game, access) for access in trace[100:]]
    assert [play(other, access) for access in trace[100:]] == rest


def test_every_kind_of_plain_data():
    value = {1: (2.5, None, [True, "a"]), (1, 2): {3}, "inf": float("inf"), "n": np.float64(0.1)}
    arrays = []
    assert decode(json.loads(json.dumps(encode(value, arrays))), arrays, OURS) == value
    assert arrays == []


def test_what_is_not_plain_is_refused():
    with pytest.raises(TypeError, match="collections, arrays and dataclasses, got function"):
        encode(Strange(lambda: 0), [])
    stored = encode(Strange(3), [])
    with pytest.raises(ValueError, match=r"the policy is of module 'tests\.cache\.prefix\.test_codec': give one"):
        decode(stored, [], OURS)
    assert decode(stored, [], {Strange.__module__}) == Strange(3)
    for bad in (["dataclass", "kvjax.cache.prefix.lru", "Access", {}], [*encode(Lru(), [])[:3], {"more": 1}]):
        with pytest.raises(ValueError, match=r"kvjax\.cache\.prefix\.lru\.\w+ has other fields now"):
            decode(bad, [], OURS)
