"""How a row's next token is chosen: settings on the host, and the same as arrays a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from kvjax.decode.grammars import Grammars, check_size, pack
from kvjax.decode.stops import Automaton, compile_stops, too_many
from kvjax.decode.widths import power_of_two
from kvjax.grammar.grammar import Grammar, digest_of
from kvjax.pytree import pytree


@dataclass(frozen=True)
class Sampling:
    """The settings of one row. The defaults are greedy decoding without an end.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the `k` most likely tokens (ties with the last are kept too); 0 keeps all.
        top_p: keep the most likely tokens until their mass reaches `p`, in (0, 1] (arXiv:1904.09751).
        min_p: keep tokens at least `min_p` times as likely as the best, in [0, 1] (arXiv:2407.01082).
        repetition: divides positive and multiplies negative logits of tokens in the prompt or the output
            so far, above 0; 1 changes nothing (arXiv:1909.05858).
        presence: subtracted from the logit of each token in the output so far.
        frequency: subtracted once for each time a token is in the output so far.
        bias: added to the logits of these token ids.
        banned: token ids that are never chosen.
        forced: the first tokens of the output, whatever their probability.
        stop: token ids that end the row; the one met is part of the output.
        stop_strings: texts that end the row once the output holds one; needs `tokenizer` in the call.
        seed: stands for the row's index in its random stream, so that a row draws the same in any place.
        limit: at most this many tokens for the row; None leaves it to the call's `max_new`.
        grammar: what the row's text may be, by `kvjax.grammar`. The row's `stop` tokens may come where the text is
            whole, and only there; without any the row ends once its text is whole and nothing can follow.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: Sequence[int] = ()
    forced: Sequence[int] = ()
    stop: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int | None = None
    limit: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self):
        def need(good: bool, name: str, expected: str):
            if not good:
                raise ValueError(f"Sampling: `{name}` must be {expected}, got {getattr(self, name)!r}")

        for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency"):
            need(isinstance(getattr(self, name), Real), name, "a number")
        for name in ("top_k", "seed", "limit"):
            need(getattr(self, name) is None or isinstance(getattr(self, name), Integral), name, "a whole number")
        for name in ("banned", "forced", "stop", "bias"):
            ids = getattr(self, name)
            need(isinstance(ids, Iterable) and all(isinstance(i, Integral) for i in ids), name, "token ids")
        need(0 <= self.temperature < float("inf"), "temperature", "finite and at least 0")
        need(0 <= self.top_k < 2**31, "top_k", "in [0, 2**31)")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(0 < self.repetition < float("inf"), "repetition", "finite and above 0")
        need(math.isfinite(self.presence), "presence", "finite")
        need(math.isfinite(self.frequency), "frequency", "finite")
        need(all(value < float("inf") for value in self.bias.values()), "bias", "finite, or -inf to ban a token")
        need(not isinstance(self.stop_strings, str), "stop_strings", "a sequence of texts, not one text")
        need(all(isinstance(x, str) and x for x in self.stop_strings), "stop_strings", "texts, and none of them empty")
        need(self.seed is None or 0 <= self.seed < 2**32, "seed", "None or in [0, 2**32)")
        need(isinstance(self.grammar, Grammar | None), "grammar", "None or one of kvjax.grammar's")
        need(self.limit is None or self.limit >= 1, "limit", "None or at least 1")


GREEDY = Sampling()
"""The most likely token each time, up to the call's `max_new`."""


@pytree
class Rules:
    """`Sampling` for a batch: every setting is an array with one row each, so that none costs a compile.

    Id lists are padded with -1, and their widths to powers of two.
    """

    temperature: Float[Array, "batch"]
    top_k: Int[Array, "batch"]
    top_p: Float[Array, "batch"]
    min_p: Float[Array, "batch"]
    repetition: Float[Array, "batch"]
    presence: Float[Array, "batch"]
    frequency: Float[Array, "batch"]
    bias_ids: Int[Array, "batch biases"]
    bias: Float[Array, "batch biases"]
    forced: Int[Array, "batch forced"]
    stop: Int[Array, "batch stops"]
    strings: UInt32[Array, "batch"]
    limit: Int[Array, "batch"]
    keys: Key[Array, "batch"]
    automaton: Automaton
    grammar: Int[Array, "batch"]
    grammars: Grammars


def rules(
    sampling: Sampling | Sequence[Sampling],
    *,
    batch: int,
    vocab: int,
    max_new: int,
    key: Key[Array, ""] | None = None,
    tokenizer=None,
    width: int = 1,
) -> Rules:
    """Arrays for a batch, from one setting for all rows or one for each.

    Args:
        width: of the lists of token ids, at least.
    Raises:
        ValueError: for what `checked` refuses, or stop strings without a tokenizer.
    """
    rows = checked(sampling, batch=batch, vocab=vocab, max_new=max_new, key=key, tokenizer=tokenizer)

    def leaf(name: str, dtype=np.float32):
        return np.array([getattr(row, name) for row in rows], dtype)

    biases = [_biases(row) for row in rows]
    which, grammars = pack([row.grammar for row in rows], vocab)
    strings, automaton = compile_stops([row.stop_strings for row in rows], vocab, tokenizer)
    seeds = np.array([i if row.seed is None else row.seed for i, row in enumerate(rows)], np.uint32)
    on_host = {name: leaf(name) for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")}
    on_host |= {
        "top_k": leaf("top_k", np.int32),
        "bias_ids": _padded([list(b) for b in biases], -1, np.int32, width),
        "bias": _padded([list(b.values()) for b in biases], 0.0, np.float32, width),
        "forced": _padded([row.forced for row in rows], -1, np.int32, width),
        "stop": _padded([row.stop for row in rows], -1, np.int32, width),
        "strings": strings,
        "limit": np.array([min(row.limit or max_new, max_new) for row in rows], np.int32),
        "grammar": which,
    }
    keys = _row_keys(jax.random.key(0) if key is None else key, seeds)
    return Rules(**jax.device_put(on_host), keys=keys, automaton=automaton, grammars=grammars)


def checked(
    sampling: Sampling | Sequence[Sampling],
    *,
    batch: int,
    vocab: int,
    max_new: int,
    key: Key[Array, ""] | None,
    tokenizer=None,
) -> list[Sampling]:
    """A setting for each row, as `fitted` gives it.

    Raises:
        ValueError: for another number of settings than rows, an id outside the vocabulary, a row that samples without
            a `key`, more stop strings than fit, or a grammar that is of another vocabulary, has no text that the row's
            other settings allow, or none as short as its limit.
    """
    rows = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if wrong := [row for row in rows if not isinstance(row, Sampling)]:
        raise ValueError(f"Sampling: `sampling` must be a Sampling, or a list of them, got {wrong[0]!r}")
    if len(rows) != batch:
        raise ValueError(f"Sampling: expected one setting or {batch}, one a row, got {len(rows)}")
    if key is None and any(row.temperature > 0 for row in rows):
        raise ValueError("Sampling: a row with a temperature above 0 needs `key`, e.g. key=jax.random.key(0)")
    for name in ("bias", "banned", "forced", "stop"):
        for ids in (getattr(row, name) for row in rows):
            wrong = [i for i in ids if not 0 <= i < vocab]
            if wrong:
                raise ValueError(f"Sampling: `{name}` ids must be in [0, {vocab}), got {wrong}")
    if any(sum(value == -np.inf for value in _biases(row).values()) >= vocab for row in rows):
        raise ValueError(f"Sampling: `banned` must leave a token, but all {vocab} of the vocabulary are")
    if why := too_many([row.stop_strings for row in rows], vocab):
        raise ValueError(f"Sampling: {why}")
    rows = [fitted(row, vocab, max_new, tokenizer) for row in rows]
    check_size([row.grammar for row in rows], vocab)
    return rows


def _biases(row: Sampling) -> dict[int, float]:
    return {**row.bias, **dict.fromkeys(row.banned, -np.inf)}


def fitted(row: Sampling, vocab: int, max_new: int, tokenizer) -> Sampling:
    """A row in whose grammar, if it has one, its banned and its stop tokens spell nothing, and no banned one stops.

    Raises:
        ValueError: for a grammar that `rules` refuses.
    """
    if row.grammar is None:
        return row
    grammar = row.grammar
    known = len(grammar.classes)
    if known > vocab or 2 * known < vocab:
        raise ValueError(f"Sampling: `grammar` was made for another vocabulary: it has {known} ids, the model {vocab}")
    if tokenizer is not None and digest_of(tokenizer.token_bytes()) != grammar.vocabulary:
        raise ValueError("Sampling: `grammar` was made with another tokenizer than the call's")
    banned = {*row.banned, *(i for i, value in row.bias.items() if value == -np.inf)}
    stop = [i for i in row.stop if i not in banned]
    grammar = grammar.without(banned | set(stop))
    state, forced, ended = 0, [int(i) for i in row.forced], False
    for i, token in enumerate(forced):
        if ended:
            break
        ended = token in stop and bool(grammar.accepts[state])
        if not ended:
            try:
                state = grammar.state(forced[: i + 1])
            except ValueError as error:
                raise ValueError(f"Sampling: `forced` must stay within the grammar: {error}") from error
    least, limit = len(forced) + int(grammar.least[state]), min(row.limit or max_new, max_new)
    if not ended and least > limit:
        raise ValueError(f"Sampling: `grammar` has no text of fewer than {least} tokens, but the row may have {limit}")
    return replace(row, grammar=grammar, stop=stop)


@jax.jit
def _row_keys(key: Key[Array, ""], seeds: UInt32[Array, "batch"]) -> Key[Array, "batch"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)


def _padded(rows: Sequence[Sequence[float | int]], fill: float | int, dtype, width: int) -> np.ndarray:
    table = np.full((len(rows), max(width, power_of_two(max(map(len, rows))))), fill, dtype)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
