"""Several continuations of each prompt at once, the prompt held once for all; and the best, or the most agreed on.

Sources: Stiennon et al. 2020 (arXiv:2009.01325) for the best of n; Wang et al. 2022, "Self-consistency"
(arXiv:2203.11171) for the majority.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.base import Cache, Strategy
from kvjax.cache.dense import Dense
from kvjax.cache.paged import Paged
from kvjax.decode import state as decoding
from kvjax.decode.generation import Begun, Output, check_counts, finish, seen_in
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import GREEDY, Sampling, rules
from kvjax.decode.spread import check_room, regroup, spread
from kvjax.decode.step import fill
from kvjax.decode.widths import power_of_two
from kvjax.model import Params, Transformer


def sample_n(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    n: int,
    max_new: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    inner: Strategy | None = None,
    capacity: int | None = None,
) -> Output:
    """`n` continuations of each prompt, row `p * n + i` being the `i`-th of prompt `p`; prompts are held once.

    Each row gets the tokens that `generate` gives a cache of its own, up to rounding in the logits.

    Args:
        cache: donated; takes in the prompts, and needs no room for what follows. One of one row becomes the prefix of a
            `Shared` cache, however it keeps it. A `Paged` one, of any number of rows, is forked instead: its new
            tokens come from its own capacity and pool.
        sampling: for all rows, or one each. A row draws by its index, as in `generate`. Where one setting for all
            has a `seed`, the `i`-th continuation of every prompt draws by `seed + i`; a list's seeds are as they are.
        inner: how the rows' own tokens are kept, `Dense()` if None; with a `Paged` cache, share it instead of forking.
        capacity: own tokens that a row can hold, `max_new` if None. Larger leaves room to go on, and one for
            different `max_new` costs no compile.
        **others: as `generate` takes them.
    Raises:
        ValueError: for what `generate` refuses, `n` below 1, or several prompts in a cache that cannot share them.
        FloatingPointError: if a row's logits were not finite.
    """
    return _sample(
        "sample_n", model, params, cache, tokens, lengths, n, max_new, key, sampling, tokenizer, inner, capacity
    )


def best_of(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    n: int,
    max_new: int,
    scorer: Callable[[list[int]], float] | None = None,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    inner: Strategy | None = None,
    capacity: int | None = None,
) -> Output:
    """The best of `n` continuations of each prompt: one row a prompt, with its `score`.

    Args:
        scorer: gives a row's tokens, a stop token that ended them included, a number, the higher the better; on
            the host. If None the score is the mean logprob of the row's tokens. The first of equals is taken.
        **others: as `sample_n` takes them.
    Raises:
        ValueError: for what `sample_n` refuses, or a score that is no number or NaN, with its row.
    """
    if scorer is not None:
        _check_judge(scorer, "best_of", "scorer")
    out = _sample(
        "best_of", model, params, cache, tokens, lengths, n, max_new, key, sampling, tokenizer, inner, capacity
    )
    if scorer is None:
        mean = out.logprobs.sum(1) / jnp.maximum(out.lengths, 1).astype(jnp.float32)
        score = jnp.where(out.lengths > 0, mean, -jnp.inf)
    else:
        scores = [_number(scorer(ids), row) for row, ids in enumerate(_ids(out, "best_of", "scorer"))]
        score = jnp.asarray(np.array(scores, np.float32))
    score = score.reshape(-1, n)
    best = jnp.argmax(score, axis=1).astype(jnp.int32)
    return _chosen(out, jnp.arange(score.shape[0], dtype=jnp.int32) * n + best, score.max(1))


def majority(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    n: int,
    max_new: int,
    answer: Callable[[list[int]], Hashable],
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    inner: Strategy | None = None,
    capacity: int | None = None,
) -> Output:
    """The most common answer among `n` continuations of each prompt: the first row that gave it; `score` is its votes.

    Args:
        answer: reads the answer from a row's tokens, a stop token that ended them included; on the host. None is no
            answer, and wins only where there is no other. Of answers with equal votes that one wins whose rows'
            logprobs, of all their tokens, have the higher sum.
        **others: as `sample_n` takes them.
    Raises:
        ValueError: for what `sample_n` refuses, or an answer that cannot be hashed, with its row.
    """
    _check_judge(answer, "majority", "answer")
    out = _sample(
        "majority", model, params, cache, tokens, lengths, n, max_new, key, sampling, tokenizer, inner, capacity
    )
    answers = [_hashed(answer(ids), row) for row, ids in enumerate(_ids(out, "majority", "answer"))]
    sums = np.asarray(out.logprobs, np.float64).sum(1)
    rows, votes = [], []
    for start in range(0, len(answers), n):
        voters: dict[Hashable, list[int]] = {}
        for row in range(start, start + n):
            voters.setdefault(answers[row], []).append(row)
        given = [who for what, who in voters.items() if what is not None] or list(voters.values())
        most = max(given, key=lambda who: (len(who), sums[who].sum()))
        rows.append(most[0])
        votes.append(len(most))
    return _chosen(out, jnp.asarray(np.array(rows, np.int32)), jnp.asarray(np.array(votes, np.int32)))


def _sample(
    where: str, model, params, cache, tokens, lengths, n, max_new, key, sampling, tokenizer, inner, capacity
) -> Output:
    """`sample_n`, under the name of its caller."""
    check_counts(where, n=n, max_new=max_new, **({} if capacity is None else {"capacity": capacity}))
    tokens, lengths = as_prompts(model, cache, tokens, lengths, where)
    count, vocab = tokens.shape[0], model.config.vocab
    forked = isinstance(cache.strategy, Paged) and inner is None
    if count > 1 and not forked:
        raise ValueError(
            f"{where}: `cache` must be a `Paged` one, and `inner` None, to hold several prompts once each, got {count} "
            f"prompts in {cache.strategy}: give them one at a time, each with a cache of one row, or use `Paged`"
        )
    if forked and capacity is not None:
        raise ValueError(f"{where}: `capacity` must be None where a `Paged` cache is forked: it has its own")
    batch = count * n
    settings = rules(_each(sampling, count, n), batch=batch, vocab=vocab, max_new=max_new, key=key, tokenizer=tokenizer)
    inner, capacity = None if forked else inner or Dense(), max_new if capacity is None else capacity
    check_room(model, cache, lengths, settings.limit, inner, capacity, where)
    logits, cache = fill(model, params, cache, tokens, lengths)
    rows = jnp.asarray(np.arange(batch, dtype=np.int32) // n)
    cache = regroup(cache, rows) if inner is None else spread(model, cache, batch, capacity, inner)
    seen, logits = (jnp.take(x, rows, axis=0) for x in (seen_in(tokens, lengths, vocab), logits))
    state = decoding.begin(cache, jnp.asarray(np.zeros(batch, np.int32)), seen, power_of_two(max_new))
    state, *ready = decoding.first(state, settings, logits)
    begun = Begun(state, settings, tuple(ready), None, tokens, lengths)
    return finish(begun, decoding.advance(model, params, state, settings, max_new), max_new, where)


def _each(sampling, count: int, n: int):
    """Settings a row, if one for all names a seed."""
    if not isinstance(sampling, Sampling) or sampling.seed is None:
        return sampling
    return [replace(sampling, seed=(sampling.seed + i) % 2**32) for i in range(n)] * count


def _chosen(out: Output, rows: Int[Array, "new_batch"], score: Float[Array, "new_batch"] | Int[Array, "new_batch"]):
    tokens, lengths, logprobs, reason = (
        jnp.take(x, rows, axis=0) for x in (out.tokens, out.lengths, out.logprobs, out.reason)
    )
    return Output(tokens, lengths, logprobs, regroup(out.cache, rows), reason, score=score)


def _ids(out: Output, where: str, name: str) -> list[list[int]]:
    """Each row's own tokens, on the host."""
    if traced(out.tokens, out.lengths):
        raise ValueError(f"{where}: `{name}` is called on the host, and cannot be used inside `jit`")
    lengths = np.asarray(out.lengths).tolist()
    return [row[:length] for row, length in zip(np.asarray(out.tokens).tolist(), lengths, strict=True)]


def _check_judge(judge, where: str, name: str) -> None:
    if not callable(judge):
        raise ValueError(f"{where}: `{name}` must be a function of a list of ids, got {judge!r}")


def _number(score, row: int) -> float:
    try:
        value = math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"best_of: `scorer` must return a number, got {score!r} for row {row}")
    return value


def _hashed(answer, row: int) -> Hashable:
    try:
        hash(answer)
    except TypeError as error:
        raise ValueError(f"majority: `answer` must return something hashable, got {answer!r} for row {row}") from error
    return answer
