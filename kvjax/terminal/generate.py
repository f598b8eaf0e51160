"""`kvjax generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from functools import partial

import jax

import kvjax
from kvjax.cli import Generate
from kvjax.terminal.answer import Answer, speak
from kvjax.terminal.interrupt import insisting
from kvjax.terminal.session import (
    Session,
    announce,
    new_cache,
    open_session,
    parse_draft,
    parse_grammar,
    room_for,
    sampling,
)
from kvjax.terminal.several import answer_several, check_several
from kvjax.terminal.status import dimmed, size, status


def run(command: Generate) -> int:
    """Answer or continue the prompt, and say what it took."""
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    if not prompt:
        raise ValueError("the prompt is empty" + (" (nothing came on standard input)" if command.prompt == "-" else ""))
    if command.n != 1 or command.beam:
        check_several(command)
    make = parse_draft(command.draft) if command.draft else None
    compiled = parse_grammar(command.schema, command.regex)
    session = open_session(command.where)
    draft = None if make is None else make(session)
    ids = _encode(session, prompt, command.raw)
    capacity = room_for(session, command.where, len(ids), command.max_new)
    cache = new_cache(session, capacity, max(command.n, command.beam))
    held = kvjax.nbytes(cache)
    grammar = None if compiled is None else compiled(session.tokenizer)
    if command.n != 1 or command.beam:
        return answer_several(command, session, cache, ids, grammar)
    decode = kvjax.stream if draft is None else partial(kvjax.draft.stream, draft=draft)
    steps = decode(
        session.model,
        session.params,
        cache,
        [ids],
        max_new=command.max_new,
        key=jax.random.key(command.choice.seed),
        sampling=sampling(command.choice, session, grammar),
        tokenizer=session.tokenizer,
    )
    with insisting() as check, status() as show:
        announce(show)

        def write(piece: str) -> None:
            show(None)
            if not command.json:
                sys.stdout.write(piece)
                sys.stdout.flush()

        answer = speak(steps, session.tokenizer, command.choice.stop, write, started=command.raw, interrupted=check)
    report = figures(answer, session, held, len(ids))
    if command.json:
        print(json.dumps({"text": answer.text, "tokens": list(answer.tokens), **report}, ensure_ascii=False))
    else:
        print(flush=True)
    print(dimmed(summary(report)), file=sys.stderr)
    return 0


def figures(answer: Answer, session: Session, cache_bytes: int, prompt_tokens: int) -> dict:
    """What a script would read of an answer."""
    how = None if answer.output is None else answer.output.speculated
    return {
        "reason": answer.reason,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(answer.tokens),
        "load_s": session.load_s,
        "first_token_s": answer.first_s,
        "ms_per_token": answer.ms_per_token,
        "tokens_per_s": None if answer.ms_per_token is None else 1e3 / answer.ms_per_token,
        "cache_bytes": cache_bytes,
    } | ({} if how is None else {"proposed": int(how.proposed[0]), "accepted": int(how.accepted[0])})


def summary(report: dict) -> str:
    """The same in one line for a person."""
    pace = report["ms_per_token"]
    parts = [
        f"{report['new_tokens']} tokens",
        f"first after {report['first_token_s']:.2f} s (and {report['load_s']:.2f} s of loading)",
        "-" if pace is None else f"{pace:.1f} ms a token, {report['tokens_per_s']:.1f} tokens/s",
        *([f"{report['accepted']} of {report['proposed']} guesses right"] if "proposed" in report else []),
        f"cache {size(report['cache_bytes'])}",
        f"ended by {report['reason']}",
    ]
    return " · ".join(parts)


def _encode(session: Session, prompt: str, raw: bool) -> list[int]:
    if raw:
        return session.tokenizer.encode(prompt)
    if session.tokenizer.template is None:
        raise ValueError("this model has no chat template: give --raw to continue the text as it is")
    return session.tokenizer.encode(session.tokenizer.chat([{"role": "user", "content": prompt}]))
