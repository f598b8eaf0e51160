"""From a command's settings to a loaded model, a prompt's tokens and an empty cache."""

from __future__ import annotations

import ast
import difflib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import kvjax
from kvjax.cache import STRATEGIES, Cache, Paged, Strategy
from kvjax.cli import Choice, Where
from kvjax.compiler import persist
from kvjax.decode import Sampling
from kvjax.draft import Draft, DraftModel, PromptLookup, load_draft
from kvjax.draft.kept import draft_kind
from kvjax.grammar import Grammar, json_schema, regex
from kvjax.model import Params, Transformer
from kvjax.paths import cache_dir
from kvjax.terminal.interrupt import insisting
from kvjax.terminal.status import Show, status
from kvjax.weights import Tokenizer

ROUND = 256
"""Capacities are rounded up to a multiple of this, so that few prompts need a new program."""


@dataclass(frozen=True)
class Session:
    """A model that is ready to run, and how long that took in seconds."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    strategy: Strategy
    load_s: float


def open_session(where: Where) -> Session:
    """Load what the command names.

    Raises:
        ValueError: for a model without a tokenizer, or a strategy that does not exist.
    """
    begun = time.perf_counter()
    strategy = parse_strategy(where.cache)
    persist()
    with insisting(), status(quiet=_fetches(where.model)) as show:
        show(f"loading {where.model}")
        model, params, tokenizer = kvjax.load(where.model)
    if tokenizer is None:
        raise ValueError(f"{where.model} has no tokenizer, so there is no text to read or write")
    return Session(model, params, tokenizer, strategy, time.perf_counter() - begun)


def parse_strategy(text: str) -> Strategy:
    """A strategy from its name in `kvjax.cache.STRATEGIES` and its settings: `ring:window=256,sinks=4`.

    Raises:
        ValueError: naming what is not known, and what is.
    """
    name, _, settings = text.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"--cache: expected one of {', '.join(STRATEGIES)}, got {name!r}{_nearest(name, STRATEGIES)}")
    kind: type[Any] = STRATEGIES[name]
    known = [field.name for field in fields(kind)]
    chosen: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise ValueError(f"--cache: {name} has the settings {', '.join(known)}, got {part!r}")
        try:
            chosen[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            chosen[key] = value
    try:
        return kind(**chosen)
    except TypeError as error:
        raise ValueError(f"--cache: {text!r} has a setting of the wrong type: {error}") from error


DRAFTS = {"lookup": ("k", "longest", "shortest"), "model": ("k",), "heads": ("k",), "early-exit": ("k",)}
"""Kinds of drafts, and their settings."""


def parse_draft(text: str) -> Callable[[Session], Draft]:
    """What makes a draft for a session: `lookup:k=5`, `model:PATH,k=3`, `heads:PATH`, `early-exit:PATH`.

    Raises:
        ValueError: for what is not known, with what is. What is made raises it for a draft that is not for the model.
    """
    name, _, rest = text.partition(":")
    if name not in DRAFTS:
        known = "`lookup`, `model:PATH`, `heads:PATH` or `early-exit:PATH`"
        raise ValueError(f"--draft: expected {known}, got {text!r}{_nearest(name, DRAFTS)}")
    path, *parts = ("", *filter(None, rest.split(","))) if name == "lookup" else rest.split(",")
    chosen = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in DRAFTS[name] or not value.isdecimal():
            known = ", ".join(DRAFTS[name])
            raise ValueError(f"--draft: {name} has the settings {known}, whole numbers, got {part!r}")
        chosen[key] = int(value)
    if name == "lookup":
        lookup = PromptLookup(**chosen)
        return lambda session: lookup
    if not path:
        what = (
            "a path or a hub id after the colon, as in model:smollm2" if name == "model" else "a path after the colon"
        )
        raise ValueError(f"--draft: `{name}` needs {what}")
    if name == "model":
        return lambda session: DraftModel(*kvjax.load(path)[:2], **chosen)
    if (kind := draft_kind(path)) != name:
        raise ValueError(f"--draft: {path} is a draft of the kind {kind!r}, got {text!r}")
    return lambda session: load_draft(path, session.model, session.params, **chosen)


def parse_grammar(schema: str, pattern: str) -> Callable[[Tokenizer], Grammar] | None:
    """What makes the grammar of `--schema` or `--regex` for a tokenizer; None without either.

    Raises:
        ValueError: for both at once, or a schema that is neither JSON nor a file of it.
    """
    if schema and pattern:
        raise ValueError("--schema and --regex: give one of them")
    if not schema:
        return partial(regex, pattern) if pattern else None
    text = schema if schema.lstrip().startswith(("{", "true", "false")) else _read(schema)
    try:
        return partial(json_schema, json.loads(text))
    except ValueError as error:
        raise ValueError(f"--schema: expected JSON, or a file of it, got {schema!r:.60}: {error}") from error


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--schema: {path!r:.60} is no schema, and cannot be read as a file: {error}") from error


def sampling(choice: Choice, session: Session, grammar: Grammar | None = None) -> Sampling:
    """One row's rules: the command's, the model's own ends, and none of the ids that its tokenizer has no text for."""
    tokenizer, vocab = session.tokenizer, session.model.config.vocab
    return Sampling(
        banned=range(len(tokenizer.pieces), vocab),
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        min_p=choice.min_p,
        repetition=choice.repetition,
        presence=choice.presence,
        frequency=choice.frequency,
        stop=tokenizer.stop_ids,
        stop_strings=choice.stop,
        seed=choice.seed,
        grammar=grammar,
    )


def room_for(session: Session, where: Where, prompt: int, max_new: int) -> int:
    """The cache's capacity in tokens: as asked, or enough for prompt and answer, rounded up.

    Raises:
        ValueError: if the prompt leaves no room for an answer, or the two together are more than fit.
    """
    most = session.model.config.max_positions
    limit, name = (most, "the model has positions for") if where.capacity is None else (where.capacity, "--capacity is")
    need = prompt + max_new - 1  # the last new token is never fed back
    if need > limit and not _endless(session, limit):
        advice = f"give --max-new {limit - prompt + 1} or fewer" if prompt <= limit else "shorten the prompt"
        raise ValueError(
            f"the prompt has {prompt} tokens and --max-new is {max_new}, but {name} {limit}: {advice}"
            + (", or a larger --capacity" if where.capacity is not None and limit < most else "")
        )
    return limit if where.capacity is not None else min(-(-need // ROUND) * ROUND, most)


def new_cache(session: Session, capacity: int, rows: int = 1) -> Cache:
    """An empty cache of one row, with pages for as many as it will be forked to, and for itself."""
    strategy = session.strategy
    if isinstance(strategy, Paged) and strategy.pool is None and rows > 1:
        strategy = replace(strategy, pool=(rows + 1) * -(-capacity // strategy.page))
    return strategy.init(session.model, batch=1, capacity=capacity)


def announce(show: Show) -> None:
    """Say what the wait before a first token is for."""
    show("reading the prompt (the first run also compiles, once)")


def _endless(session: Session, capacity: int) -> bool:
    return session.strategy.shapes(session.model, batch=1, capacity=capacity).capacity is None


def _fetches(model: str) -> bool:
    """Whether loading will download, and so draw a progress bar of its own."""
    if Path(model).expanduser().exists():
        return False
    return model != "smollm2" or not any((cache_dir() / "models").glob("*.gguf"))


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
