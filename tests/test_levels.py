"""Each level has what it says over the one below, counted; and the right tokens."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import kvjax
from kvjax.batch import Request, serve, turns
from kvjax.cache import Dense
from kvjax.draft import costs
from kvjax.levels import LEVELS
from tests.tiny import tiny

CAPACITY, NEW = 64, 24
PROMPTS = [[*range(1, 36), 40 + i] for i in range(6)]


@pytest.fixture(scope="module")
def served():
    """Results by prompt, and the serving afterwards, of each level."""
    model, params = tiny()
    made = {}
    with pytest.MonkeyPatch.context() as patch:  # what a level can do, and not what calls take on this machine
        patch.setattr(costs, "filled", lambda seconds, choices: np.ones(len(choices), np.float32))
        patch.setattr(turns, "can_time", lambda *_: False)
        serve_all(model, params, made)
    return made


def serve_all(model, params, made):
    for name, level in LEVELS.items():
        source = serve(
            model,
            params,
            level.open(model, capacity=CAPACITY, max_new=NEW),
            [Request(i, prompt, NEW) for i, prompt in enumerate(PROMPTS)],
        )
        results = []
        while True:
            try:
                results.append(next(source))
            except StopIteration as end:
                made[name] = {r.name: r for r in results}, end.value
                break


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "legendary"])
def test_tokens_of_generate(served, name):
    model, params = tiny()
    for i, prompt in enumerate(PROMPTS):
        cache = Dense().init(model, batch=1, capacity=CAPACITY)
        want = kvjax.generate(model, params, cache, [prompt], max_new=NEW)
        assert served[name][0][i].tokens == want.tokens[0].tolist()


def test_legendary_rounds_and_no_more(served):
    """Keys in bfloat16: most tokens are the same, at half the bytes of the level below."""
    same = [
        np.mean(np.array(served["legendary"][0][i].tokens) == np.array(served["master"][0][i].tokens)) for i in range(6)
    ]
    assert np.mean(same) > 0.6
    pages = {name: kvjax.nbytes(served[name][1].slots.cache.layers) for name in ("master", "legendary")}
    assert pages["legendary"] * 2 == pages["master"]


def test_each_adds_what_it_says(served):
    accepted, reused, slots = (
        {name: count(*of) for name, of in served.items()}
        for count in (
            lambda results, _: sum(r.accepted for r in results.values()),
            lambda results, _: sum(r.reused for r in results.values()),
            lambda _, serving: len(serving.seated),
        )
    )
    assert accepted["basic"] == 0 < accepted["advanced"]
    assert reused["advanced"] == 0 < reused["expert"]
    assert reused["master"] > 0  # also where prompts come together
    assert slots["expert"] == 1 < slots["master"]
    assert kvjax.nbytes(served["master"][1].slots.cache) == pytest.approx(
        kvjax.nbytes(served["expert"][1].slots.cache), rel=0.05
    )  # in the same memory


def test_they_are_frozen():
    with pytest.raises(FrozenInstanceError):
        LEVELS["basic"].rows = 2
    assert len({repr(level) for level in LEVELS.values()}) == 5
