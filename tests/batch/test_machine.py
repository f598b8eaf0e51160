"""No request is lost, made twice or mixed up, in whatever order requests come, wait, are cancelled and end."""

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvjax  # noqa: F401 - loaded before Hypothesis counts time
from kvjax import Sampling, batch
from kvjax.batch import Request, Settings
from kvjax.cache import Paged
from kvjax.cache.prefix import POLICIES
from kvjax.draft import PromptLookup
from tests.batch.requests import CAPACITY, KEY, MAX_NEW, alone
from tests.tiny import tiny
from tests.tiny_model import bytes_tokenizer

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(stop=list(range(16))),
    Sampling(temperature=1.0, seed=4, stop_strings=[chr(i) for i in range(33, 45)]),
]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 30, 31], [9, 8], [1, 2, 3, 4, 40], [50] * 20]


@cache
def wanted(prompt: int, new: int, how: int) -> tuple[list[int], str]:
    return alone(Request("", PROMPTS[prompt], new, SAMPLINGS[how]), 0)


class Serving(RuleBasedStateMachine):
    @initialize(
        preempt=st.sampled_from(["recompute", "offload"]),
        store=st.sampled_from([None, "lru"]),
        pool=st.sampled_from([9, 11]),
        draft=st.sampled_from([None, PromptLookup(k=3, shortest=1)]),
    )
    def start(self, preempt, store, pool, draft):
        model, _ = tiny()
        self.model, self.params = tiny()
        self.time, self.sent, self.results = 0.0, {}, {}
        costs = None if draft is None else [1.0] * 3  # measured ones are others each time
        self.serving = batch.open(
            model,
            Paged(page=4, pool=pool),
            slots=3,
            capacity=CAPACITY,
            max_new=MAX_NEW,
            key=KEY,
            store=None if store is None else POLICIES[store],
            settings=Settings(
                chunk=8, steps=4, patience=5.0, preempt=preempt, draft=draft, costs=costs, tokenizer=bytes_tokenizer()
            ),
        )

    def take(self, results):
        for result in results:
            assert result.name in self.sent and result.name not in self.results
            self.results[result.name] = result
            tokens, reason = wanted(*self.sent[result.name])
            if result.reason == "cancelled":
                assert result.tokens == tokens[: len(result.tokens)]
            else:
                assert (result.tokens, result.reason) == (tokens, reason)

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        new=st.sampled_from([1, 3, 16]),
        how=st.integers(0, len(SAMPLINGS) - 1),
        priority=st.integers(0, 2),
    )
    def submit(self, prompt, new, how, priority):
        name = len(self.sent)
        self.sent[name] = prompt, new, how
        request = Request(name, PROMPTS[prompt], new, SAMPLINGS[how], priority=priority)
        self.serving, results = batch.submit(self.model, self.serving, request, self.time)
        assert results == []

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.sent)))
        self.serving, results = batch.cancel(self.serving, name, self.time)
        assert [r.name for r in results] == ([name] if name not in self.results else [])
        self.take(results)

    @rule(turns=st.integers(1, 3))
    def turn(self, turns):
        for _ in range(turns):
            self.time += 1.0
            self.serving, results = batch.turn(self.model, self.params, self.serving, self.time)
            self.take(results)

    @invariant()
    def nobody_is_lost(self):
        seated = [t.request.name for t in self.serving.seated if t is not None]
        waiting = [t.request.name for t in self.serving.waiting]
        assert sorted([*seated, *waiting, *self.results]) == sorted(self.sent)
        assert self.serving.names == set(seated) | set(waiting)

    def teardown(self):
        if not hasattr(self, "serving"):
            return
        for _ in range(40 * (len(self.sent) + 1)):
            if self.serving.idle:
                break
            self.turn(1)
        assert set(self.results) == set(self.sent)
        pages = self.serving.slots.cache.shared
        kept = 0 if self.serving.store is None else len(self.serving.store.blocks)
        assert int((pages.refs > 0).sum()) == kept


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
