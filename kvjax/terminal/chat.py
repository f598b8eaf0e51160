"""`kvjax chat`: turns that share one cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import jax

import kvjax
from kvjax.cli import Chat
from kvjax.paths import cache_dir
from kvjax.terminal.answer import Answer, speak
from kvjax.terminal.conversation import Conversation, ask, begin, told
from kvjax.terminal.generate import figures
from kvjax.terminal.interrupt import noticing
from kvjax.terminal.session import Session, announce, new_cache, open_session, sampling
from kvjax.terminal.status import dimmed, status

CAPACITY = 2048
"""Tokens a chat has room for unless told otherwise; more of them make every step slower on a CPU."""

HELP = """\
/help           this text
/reset          forget the conversation
/system TEXT    begin anew, with TEXT as what the model is told first
/quit           leave (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C while the model speaks stops that answer; what it said is kept."""


def run(command: Chat) -> int:
    """Take turns until the user leaves or standard input ends."""
    session = open_session(command.where)
    if session.tokenizer.template is None:
        raise ValueError("this model has no chat template; `kvjax generate --raw` continues plain text")
    conversation = begin(command.system)
    if sys.stdin.isatty():
        _tell("/help says what else you can type; /quit leaves.")
    turns = 0
    for line in _lines(prompt="" if command.json else "> "):
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            break
        if word == "/reset":
            system = conversation.messages[:1] if conversation.messages[:1] else ()
            conversation = begin(system[0]["content"] if system and system[0]["role"] == "system" else None)
            _tell("The conversation is forgotten.")
        elif word == "/system":
            conversation = begin(rest or None)
            _tell("A new conversation begins.")
        elif word == "/help":
            _tell(HELP)
        elif word.startswith("/") and word[1:].isalpha():
            _tell(f"There is no command {word}.\n{HELP}")
        elif line.strip():
            conversation = _turn(command, session, conversation, line.strip(), turns)
            turns += 1
    return 0


def _turn(command: Chat, session: Session, before: Conversation, message: str, number: int) -> Conversation:
    """Ask, show the answer, and return what is now said; a turn that does not fit changes nothing."""
    asked = ask(before, session.tokenizer, message)
    cache, held = asked.cache, asked.held
    if cache is None:
        default = min(CAPACITY, session.model.config.max_positions)
        cache = new_cache(session, command.where.capacity or default)
    room = command.max_new if cache.capacity is None else cache.capacity - len(asked.ids) + 1
    if room < 1:
        _tell(
            f"The context is full: this turn needs {len(asked.ids)} tokens of {cache.capacity}. "
            "/reset forgets the conversation; a larger --capacity makes room for longer ones."
        )
        return before
    size = kvjax.nbytes(cache)
    rules = replace(sampling(command.choice, session), limit=min(room, command.max_new))
    steps = kvjax.stream(
        session.model,
        session.params,
        cache,
        [list(asked.ids[held:])],
        max_new=command.max_new,
        key=jax.random.fold_in(jax.random.key(command.choice.seed), number),
        sampling=rules,
        tokenizer=session.tokenizer,
    )
    try:
        with noticing() as pressed, status(quiet=command.json) as show:
            if number == 0:
                announce(show)

            def write(piece: str) -> None:
                show(None)
                if not command.json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()

            answer = speak(steps, session.tokenizer, command.choice.stop, write, started=False, interrupted=pressed)
    except KeyboardInterrupt:  # pressed twice, before a token came: the turn is dropped, and the cache with it
        _tell("\nThe turn is dropped.")
        return replace(before, cache=None)
    _report(command, session, answer, size, len(asked.ids) - held, room)
    return told(asked, session.tokenizer, answer)


def _report(command: Chat, session: Session, answer: Answer, size: int, prefilled: int, room: int) -> None:
    if command.json:
        report = {"text": answer.text, "tokens": list(answer.tokens), **figures(answer, session, size, prefilled)}
        print(json.dumps(report, ensure_ascii=False), flush=True)
        return
    print(flush=True)
    pace = answer.ms_per_token
    speed = "" if not pace else f" · {1e3 / pace:.0f} tok/s"
    _tell(f"{prefilled} tokens read · {len(answer.tokens)} written{speed} · ended by {answer.reason}")
    if answer.reason == "limit" and room <= command.max_new:
        _tell("The context is full: /reset forgets the conversation; a larger --capacity makes room.")


def _lines(prompt: str) -> Iterator[str]:
    """What the user types, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    keep = _history()
    try:
        while True:
            try:
                yield input(prompt)
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
    finally:
        keep()


def _history():
    """Give `input` its arrow keys and what was typed in earlier chats; returns what saves it."""
    try:
        import readline
    except ImportError:  # Windows has none
        return lambda: None
    path = cache_dir() / "chat_history"

    def keep() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
        except OSError:
            return

    try:
        readline.read_history_file(path)
    except OSError:
        return keep
    return keep


def _tell(text: str) -> None:
    print(dimmed(text), file=sys.stderr)
