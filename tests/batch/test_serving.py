"""serve: each request gets what it gets alone, whatever comes beside it, and none is lost."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Precision, Sampling, batch
from kvjax.batch import Cancel, Request, Settings, steps
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Shared
from kvjax.cache.prefix import POLICIES
from kvjax.decode.grammars import table_bytes
from kvjax.draft import DraftModel, EarlyExit, Heads, PromptLookup, costs
from kvjax.grammar import regex
from tests.batch.requests import CAPACITY, KEY, MAX_NEW, alone, several
from tests.compiles import Compiles
from tests.grammar.expressions import small_tokenizer
from tests.tiny import tiny
from tests.tiny_model import bytes_tokenizer

SMALL = Paged(page=4, pool=14)
"""Pages for a row and a half at most."""


def opened(strategy=SMALL, slots=4, store=None, **settings):
    model, _ = tiny()
    policy = None if store is None else POLICIES[store]
    made = Settings(**{"chunk": 5, "steps": 4, "tokenizer": bytes_tokenizer(), **settings})
    return batch.open(
        model, strategy, slots=slots, capacity=CAPACITY, max_new=MAX_NEW, key=KEY, store=policy, settings=made
    )


def served(serving, requests, **how):
    """Results by name, and the serving after them."""
    model, params = tiny()
    source, results = batch.serve(model, params, serving, requests, **how), []
    while True:
        try:
            results.append(next(source))
        except StopIteration as end:
            assert len({r.name for r in results}) == len(results)
            return {r.name: r for r in results}, end.value


def right(results, requests, strategy=None, tokenizer=None):
    for number, request in enumerate(requests):
        result = results[request.name]
        assert (result.tokens, result.reason) == alone(request, number, strategy, tokenizer), request


def all_free(serving):
    assert serving.idle and batch.watch(serving.slots).free.all() and not serving.names
    if isinstance(serving.slots.cache.strategy, Paged):
        pages = serving.slots.cache.shared
        kept = 0 if serving.store is None else len(serving.store.blocks)
        assert int((pages.refs > 0).sum()) == int(pages.kept.sum()) == kept
        assert (pages.table == -1).all()


@pytest.mark.parametrize("preempt", ["recompute", "offload", "compress"])
@pytest.mark.parametrize("store", [None, "workload_adaptive"])
def test_too_few_pages_for_all(preempt, store):
    requests = several(0, 14, prefix=9)
    results, after = served(opened(preempt=preempt, store=store), requests)
    right(results, requests)
    all_free(after)
    assert sum(r.parked for r in results.values()) > 0
    assert (sum(r.reused for r in results.values()) > 0) == (store is not None)


@pytest.mark.parametrize(
    "strategy",
    [
        Dense(),
        Ring(),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (Quantized(8, residual=8), Evicting(CAPACITY))),
    ],
    ids=lambda s: type(s).__name__,
)
def test_rows_of_any_cache(strategy):
    requests = several(1, 9)
    results, after = served(opened(strategy), requests)
    right(results, requests, strategy)
    all_free(after)


def drafts():
    model, params = tiny()
    ids = np.arange(61, dtype=np.int32)
    return {
        "lookup": PromptLookup(k=3, shortest=1),
        "model": DraftModel(model, params, k=2),
        "heads": Heads.of(model, params, trained=Heads.fresh(model, params, ids, jax.random.key(2)), k=2),
        "exit": EarlyExit.of(model, params, layers=1, exit=EarlyExit.fresh(model, params, ids), k=2),
    }


@pytest.mark.parametrize(
    ("draft", "preempt"),
    [("lookup", "offload"), ("model", "offload"), ("heads", "offload"), ("heads", "recompute"), ("exit", "recompute")],
)
def test_with_guesses(draft, preempt):
    requests = [replace(r, speculate=r.name != 3) for r in several(2, 9)]
    settings = {"draft": drafts()[draft], "costs": [1.0] * 3}
    results, after = served(opened(preempt=preempt, **settings), requests)
    right(results, requests)
    all_free(after)
    assert results[3].proposed == 0
    assert sum(r.proposed for r in results.values()) > 0
    if draft == "model":  # it is the target itself: what it has kept of a row's last request would make it wrong
        plain = [results[r.name] for r in requests if r.sampling == Sampling() and r.speculate]
        assert len(plain) > 1 and all(r.accepted == r.proposed for r in plain)


def test_what_guesses_cost_is_measured_while_requests_are_served(monkeypatch):
    """By the one program that decodes, also where pages are few; and not again."""
    monkeypatch.setattr(costs, "_TIMED", {})
    requests = [replace(r, max_new=MAX_NEW) for r in several(2, 24) if not r.sampling.stop_strings]  # another program
    draft = drafts()["lookup"]
    with Compiles() as compiles:
        results, after = served(opened(draft=draft, steps=7), requests)
    right(results, requests)
    all_free(after)
    assert compiles.of("advance") == 1
    (timed,) = costs._TIMED.values()
    assert timed.turns == 6 and np.isfinite(timed.seconds).all() and (timed.seconds > 0).all()
    monkeypatch.setattr(batch.turns, "time_rounds", None)
    served(after, [Request("one more", [5, 9, 5, 9], 8)])


@pytest.mark.parametrize("draft", ["lookup", "model", "heads", "exit"])
def test_a_draft_keeps_nothing_of_who_sat_there_before(draft):
    """In a slot that was another's a request has the guesses, right and wrong, that it has in a new one."""
    first, second = [Request(name, tokens, 12) for name, tokens in (("a", [5, 9, 5, 9, 5]), ("b", [7, 3, 7, 3, 7, 3]))]
    settings = {"slots": 1, "draft": drafts()[draft], "costs": [1.0] * 3}
    had, _ = served(opened(**settings), [first, second])
    alone, _ = served(opened(**settings), [second])
    assert alone["b"].proposed > 0
    assert (had["b"].proposed, had["b"].accepted) == (alone["b"].proposed, alone["b"].accepted)


def of_another_vocabulary():
    model = kvjax.Transformer(replace(tiny()[0].config, vocab=60))
    return DraftModel(model, kvjax.init_params(model, KEY), k=2)


SMALL_WORDS = small_tokenizer()
PAIRS, LETTERS, ENDED = (regex(text, SMALL_WORDS) for text in ("(ab|cd){6,9}", "[a-c]{2}(d[a-c]{1,3})*", "a?b?c"))


@pytest.mark.parametrize(
    ("draft", "preempt"),
    [
        (None, "offload"),
        (PromptLookup(k=3, shortest=1), "recompute"),
        pytest.param(None, "recompute", marks=pytest.mark.slow),
        pytest.param(PromptLookup(k=3, shortest=1), "offload", marks=pytest.mark.slow),
    ],
    ids=["plain-offload", "guesses-recompute", "plain-recompute", "guesses-offload"],
)
def test_grammars_of_rows(preempt, draft):
    """Rows with grammars, some the same, beside rows without any, leave and come back."""
    grammars = (PAIRS, None, LETTERS, None, ENDED, PAIRS, LETTERS)
    requests = [
        Request(r.name, r.tokens, 16, Sampling(temperature=float(i % 2), grammar=grammars[i % 7]))
        for i, r in enumerate(several(6, 14))
    ]
    results, after = served(
        opened(preempt=preempt, draft=draft, costs=None if draft is None else [1.0] * 3, tokenizer=SMALL_WORDS),
        requests,
    )
    right(results, requests, tokenizer=SMALL_WORDS)
    assert sum(r.parked for r in results.values()) > 0
    assert {r.reason for r in results.values()} == {"grammar complete", "limit"}
    for request in requests:
        if request.sampling.grammar is not None:
            request.sampling.grammar.state(results[request.name].tokens)
    plain, after = served(after, [Request(n, [n, 1], 2) for n in range(3)])  # the last clears the tables away
    assert after.slots.rules.grammars.none and len(plain) == 3
    all_free(after)


def test_a_grammar_no_request_can_keep_is_refused_alone(unchecked):
    long = Request("long", [3], 2, Sampling(grammar=PAIRS))
    other = Request("other", [3], 8, Sampling(grammar=regex("a+", bytes_tokenizer())))
    good = Request(2, [3, 4], 12, Sampling(grammar=PAIRS))
    results, _ = served(opened(Dense(), tokenizer=SMALL_WORDS), [long, other, good])
    assert "no text of fewer than 6 tokens, but the row may have 2" in results["long"].error
    assert "another vocabulary" in results["other"].error
    assert (results[2].tokens, results[2].reason) == alone(good, 2, tokenizer=SMALL_WORDS)


def test_grammars_too_large_together_wait_for_each_other(monkeypatch):
    most = table_bytes([PAIRS, LETTERS], 61)
    for module in (batch.turns, kvjax.decode.grammars):
        monkeypatch.setattr(module, "MOST_BYTES", most)
    requests = [Request(i, [i, 5], 9, Sampling(grammar=g)) for i, g in enumerate([PAIRS, LETTERS, ENDED, PAIRS])]
    assert table_bytes([PAIRS, LETTERS, ENDED], 61) > most
    results, after = served(opened(Dense(), tokenizer=SMALL_WORDS), requests)
    right(results, requests, tokenizer=SMALL_WORDS)
    all_free(after)


def test_priority_takes_a_row_and_gives_it_back():
    """Two slots, two long requests under way, and an urgent one comes."""
    model, params = tiny()
    slow = [Request(n, [n + 1, 5, 6], 16) for n in range(2)]
    urgent = Request("urgent", [7, 8], 4, priority=1.0)
    for preempt in ("recompute", "offload"):
        serving = opened(Dense(), slots=2, steps=2, preempt=preempt)
        for request in slow:
            serving, _ = batch.submit(model, serving, request, 0.0)
        done = []
        for turn in range(30):
            if turn == 2:
                serving, _ = batch.submit(model, serving, urgent, 2.0)
            serving, results = batch.turn(model, params, serving, float(turn))
            done += results
        assert [r.name for r in done] == ["urgent", 0, 1]
        right({r.name: r for r in done}, [*slow, urgent])
        assert [r.parked for r in done] == [0, 0, 1]


def test_patience_ends_a_low_priority():
    """A stream of better requests does not keep one waiting for ever."""
    model, params = tiny()
    serving = opened(Dense(), slots=1, patience=4.0)
    serving, _ = batch.submit(model, serving, Request("low", [3], 2, priority=0.0), 0.0)
    order = []
    for turn in range(40):
        serving, _ = batch.submit(model, serving, Request(turn, [4, 5], 2, priority=5.0), float(turn))
        serving, results = batch.turn(model, params, serving, float(turn))
        order += [r.name for r in results]
    assert 0 < order.index("low") < 38


def test_bad_requests_are_refused_alone(unchecked):
    good = several(3, 3)
    bad = [
        (Request("empty", [], 4), "`tokens` has an empty prompt"),
        (Request("id", [99], 4), r"ids in \[0, 61\)"),
        (Request("long", [1] * 30, 16), "need 45 slots, but a row's capacity is 40"),
        (Request("new", [1], 17), "`max_new` must be at most the slots' 16, got 17"),
        (Request("none", [1], 0), "`max_new` must be at least 1"),
        (Request("lists", [1], 2, Sampling(stop=list(range(20)))), "`stop` has 20 token ids"),
        (Request("banned", [1], 2, Sampling(stop=[61])), r"`stop` ids must be in \[0, 61\)"),
        (Request("strings", [1], 2, Sampling(stop_strings=[f"{i}" for i in range(33)])), "at most 32 distinct stop"),
        (Request("letters", [1], 2, Sampling(stop_strings=["x" * 600_000])), "stop strings would take"),
        (Request(0, [1], 2), "`name` must be new, but 0 is on its way already"),
    ]
    requests = [good[0], *(r for r, _ in bad[:-1]), *good[1:]]
    results, after = served(opened(), requests)
    for request, words in bad[:-1]:
        assert results[request.name].reason == "refused"
        with pytest.raises(ValueError, match=words):
            raise ValueError(results[request.name].error)
    for number, request in ((0, good[0]), (10, good[1]), (11, good[2])):
        assert (results[request.name].tokens, results[request.name].reason) == alone(request, number)
    model, params = tiny()
    serving, _ = batch.submit(model, after, Request(0, [1, 2], 2), 0.0)
    _, (twice,) = batch.submit(model, serving, bad[-1][0], 0.0)
    assert "must be new" in str(twice.error)
    (odd,) = served(opened(), ["what"])[0].values()
    assert "`requests` must be Requests or Cancels, got str" in str(odd.error)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampling": None}, "`sampling` must be a Sampling, got None"),
        ({"priority": "high"}, "`priority` must be a finite number, got 'high'"),
        ({"priority": math.nan}, "`priority` must be a finite number, got nan"),
        ({"arrival": "x"}, "`arrival` must be a finite number"),
        ({"speculate": None}, "`speculate` must be True or False"),
    ],
)
def test_a_request_that_is_none_is_refused_where_it_is_made(wrong, words, unchecked):
    with pytest.raises(ValueError, match=words):
        Request(0, [1], 2, **wrong)


def test_stop_strings_too_many_together_wait_for_each_other():
    """Three requests with 12 strings of their own each: no more than two are seated at a time."""
    requests = [
        Request(name, [3 + name, 9], 8, Sampling(stop_strings=[f"{chr(65 + name)}{i}" for i in range(12)]))
        for name in range(3)
    ]
    results, after = served(opened(Dense()), requests)
    right(results, requests)
    all_free(after)


def test_a_request_larger_than_the_pool_is_refused():
    results, _ = served(opened(Paged(page=4, pool=3)), [Request(0, [1] * 8, 8), Request(1, [1] * 4, 4)])
    assert "need 4 pages of 4 tokens, but the pool has 3" in results[0].error and results[1].reason == "limit"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"strategy": Shared()}, "`strategy` must keep rows apart, but rows of Shared"),
        ({"strategy": Quantized(8, residual=8), "preempt": "compress"}, "'compress' only where keys are held in full"),
        ({"preempt": "forget"}, "`preempt` must be one of recompute, offload, compress, got 'forget'"),
        ({"chunk": 0}, "`chunk` must be at least 1"),
        ({"patience": 0.0}, "`patience` must be above 0"),
        ({"prefill": (1,)}, "`prefill` must be a model and its parameters, got tuple"),
        ({"prefill": tiny("qwen3")}, "`prefill` must be of the model's config"),
        ({"draft": PromptLookup(k=3), "costs": [1.0]}, "batch.open: `costs` must have 3 entries"),
        ({"draft": of_another_vocabulary()}, "its vocabulary must be the target.s, 61 tokens, got 60"),
        ({"draft": PromptLookup(k=CAPACITY)}, "`k` must be below `capacity`, 40, got 40"),
        ({"strategy": Dense(), "store": "lru"}, "must be a Paged one"),
    ],
)
def test_what_cannot_be_opened(how, words, unchecked):
    with pytest.raises(ValueError, match=words):
        opened(**how)
    model, params = tiny()
    with pytest.raises(ValueError, match="`pace` must be above 0"):
        next(batch.serve(model, params, opened(), [], pace=0.0))


def test_cancelled_wherever_it_is():
    model, params = tiny()
    requests = several(4, 6)
    serving = opened(Dense(), slots=2, steps=1)
    for request in requests:
        serving, _ = batch.submit(model, serving, request, 0.0)
    serving, _ = batch.turn(model, params, serving, 0.0)
    seated = next(t.request.name for t in serving.seated if t is not None)
    serving, (gone,) = batch.cancel(serving, seated, 1.0)
    tokens, _ = alone(requests[seated], seated)
    assert gone.reason == "cancelled" and gone.tokens == tokens[: len(gone.tokens)]
    serving, (waiting,) = batch.cancel(serving, requests[-1].name, 1.0)
    assert waiting.reason == "cancelled" and waiting.tokens == []
    serving, nothing = batch.cancel(serving, "nobody", 1.0)
    assert nothing == []
    rest = [r for r in requests if r.name not in (seated, requests[-1].name)]
    results, after = served(serving, [])
    assert all((results[r.name].tokens, results[r.name].reason) == alone(r, r.name) for r in rest if r.name in results)
    assert set(results) | {seated, requests[-1].name} == {r.name for r in requests}
    all_free(after)


def test_a_cancel_among_requests_and_arrivals_in_time():
    requests = [replace(r, arrival=0.05 * i) for i, r in enumerate(several(5, 4))]
    late = Request("late", [1, 2, 3], 16, arrival=0.3)
    results, after = served(opened(Dense()), [*requests, late, Cancel("late", arrival=0.3)], pace=1.0)
    right(results, requests)
    assert results["late"].reason == "cancelled"
    assert all(results[request.name].arrived >= request.arrival for request in requests)
    assert results[3].arrived >= 0.15 and results[3].first <= results[3].done
    all_free(after)


def test_requests_are_read_as_they_are_needed():
    model, params = tiny()
    taken = []

    def endless():
        for name in range(1000):
            taken.append(name)
            yield Request(name, [name % 60, 3], 3)

    source = batch.serve(model, params, opened(Dense(), slots=2), endless())
    for _ in range(6):
        next(source)
    assert len(taken) < 16


def test_it_goes_on_from_what_comes_back():
    first, second = several(6, 4, prefix=8), several(6, 8, prefix=8)[4:]
    results, after = served(opened(store="lru"), first)
    again, after = served(after, second)
    for number, request in enumerate([*first, *second]):
        result = (results | again)[request.name]
        assert (result.tokens, result.reason) == alone(request, number)
    assert again[5].reused >= 8


def test_prompts_by_another_precision():
    """The prefill program is the one given: its rounding, in bfloat16, is seen in what is decoded after it."""
    model, params = tiny()
    coarse, rounded = tiny("llama", Precision(params="bfloat16", compute="bfloat16"))
    requests = [Request(n, [n + 1, 5, 6, 7, 8, 9], 8) for n in range(4)]
    results, _ = served(opened(Dense(), prefill=(coarse, rounded)), requests)
    for request in requests:
        cache = Dense().init(model, batch=1, capacity=CAPACITY)
        logits, cache = kvjax.prefill(coarse, rounded, cache, [request.tokens])
        want = [int(logits.argmax())]
        score = float(jax.nn.log_softmax(logits.astype(jnp.float32))[0, want[0]])
        rest = kvjax.generate(model, params, cache, [want], max_new=7)
        assert results[request.name].tokens == want + rest.tokens[0].tolist()
        np.testing.assert_allclose(results[request.name].logprobs[0], score, atol=1e-5)


def test_requests_cost_no_compile():
    served(opened(), several(7, 6))
    plain = [replace(r, sampling=Sampling(temperature=0.5, seed=3)) for r in several(8, 7)]
    served(opened(), plain)
    with Compiles() as compiles:
        served(opened(), [replace(r, sampling=Sampling(temperature=0.9, top_k=4)) for r in several(9, 8)])
    assert compiles.of("_decode") == compiles.of("_feed") == compiles.of("_admit") == compiles.of("_retire") == 0


@pytest.mark.parametrize("strategy", [Dense(), Paged(page=64)], ids=["dense", "paged"])
def test_the_cache_stays_in_place(strategy):
    model, params = tiny()
    slots = batch.init(model, strategy, slots=4, capacity=4096, max_new=8)
    bound = kvjax.nbytes(slots.cache)
    feed = steps._feed.lower(model, params, slots, jnp.int32(0), jnp.int32(8), width=8).compile().memory_analysis()
    decode = steps._decode.lower(model, params, slots, jnp.int32(4), jnp.int32(1)).compile().memory_analysis()
    for memory in (feed, decode):
        assert memory.alias_size_in_bytes >= bound
        assert memory.temp_size_in_bytes < bound / 2


def test_the_pure_functions_alone():
    """init, admit, step, retire, without a scheduler."""
    model, params = tiny()
    slots = batch.init(model, Paged(page=4), slots=3, capacity=24, max_new=6)
    slots = batch.admit(model, slots, 1, [3, 4, 5, 6, 7], max_new=6)
    slots = batch.admit(model, slots, 2, [8], max_new=3, sampling=Sampling(temperature=1.0, seed=4), key=KEY)
    with pytest.raises(ValueError, match="`row` must be a free one of 3, got 1"):
        batch.admit(model, slots, 1, [3], max_new=2)
    while not batch.watch(slots).ended[1:].all():
        slots = batch.step(model, params, slots, chunk=2)
    slots, made = batch.retire(slots, [1, 2])
    for number, (tokens, new, sampling, row) in enumerate(
        [([3, 4, 5, 6, 7], 6, Sampling(), made[0]), ([8], 3, Sampling(temperature=1.0, seed=4), made[1])]
    ):
        assert row.tokens == alone(Request("x", tokens, new, sampling), number)[0]
    assert batch.watch(slots).free.all() and int(slots.cache.shared.free) == slots.cache.shared.refs.shape[0]


@pytest.mark.parametrize(
    "strategy",
    [
        Dense(),
        Ring(window=6, sinks=2),
        Paged(page=4, pool=10),
        Quantized(8, residual=8),
        Evicting(9, sinks=1, recent=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("store", [False, True])
def test_nothing_is_left_of_keys_that_were_not_finite(strategy, store):
    """Who comes after, in the same row and the same pages, gets what it gets alone."""
    if store and not isinstance(strategy, Paged):
        pytest.skip("a prefix store needs pages")
    model, params = tiny()
    broken = params | {"embed": params["embed"].at[60].set(math.nan)}
    model = kvjax.Transformer(replace(model.config, tied=False))
    broken |= {"head": kvjax.init_params(model, KEY)["head"] * 10}
    requests = [Request(0, [1, 2, 3, 4, 60, 5, 6], 5), Request(1, [1, 2, 3, 4, 8], 5), Request(2, [9, 2, 3], 5)]
    kept = POLICIES["workload_adaptive"] if store else None
    serving = batch.open(model, strategy, slots=1, capacity=16, max_new=8, store=kept)
    results = {r.name: r for r in batch.serve(model, broken, serving, requests)}
    assert results[0].reason == "not finite" and results[1].reused == 0
    for number in (1, 2):
        cache = strategy.init(model, batch=1, capacity=16)
        free = kvjax.generate(model, broken, cache, [list(requests[number].tokens)], max_new=5)
        assert results[number].tokens == free.tokens[0].tolist() and results[number].reason == "limit"


def test_prompts_that_come_together_share_what_they_begin_with():
    common = list(range(3, 24))
    requests = [Request(name, [*common, 30 + name], 4) for name in range(4)]
    results, after = served(opened(Paged(page=4, pool=60), store="workload_adaptive"), requests)
    right(results, requests)
    all_free(after)
    assert [results[name].reused for name in range(4)] == [0, 20, 20, 20]


def test_a_row_without_finite_logits_ends_alone():
    model, params = tiny()
    broken = params | {"embed": params["embed"].at[60].set(math.nan)}
    model = kvjax.Transformer(replace(model.config, tied=False))
    head = kvjax.init_params(model, KEY)["head"] * 10
    requests = [Request("good", [1, 2, 3], 5), Request("bad", [1, 60, 3], 5)]
    serving = batch.open(model, Dense(), slots=2, capacity=16, max_new=8)
    results = {r.name: r for r in batch.serve(model, broken | {"head": head}, serving, requests)}
    assert results["bad"].reason == "not finite" and results["bad"].tokens == []
    assert results["good"].reason == "limit" and len(results["good"].tokens) == 5
