"""`kvjax generate --n` and `--beam`: several answers to one prompt, which is held once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator

import jax
import numpy as np

import kvjax
from kvjax.cache import Cache
from kvjax.cli import Choice, Generate
from kvjax.decode import Output, Step
from kvjax.grammar import Grammar
from kvjax.terminal.answer import Answer, speak
from kvjax.terminal.session import Session, announce, sampling
from kvjax.terminal.status import dimmed, size, status


def check_several(command: Generate) -> None:
    """Raise ValueError for settings that do not go with several answers."""
    if command.n < 1 or command.beam < 0:
        raise ValueError(f"--n must be at least 1 and --beam at least 0, got {command.n} and {command.beam}")
    if command.draft:
        raise ValueError("--draft guesses for one answer: leave it out with --n or --beam")
    if not command.beam:
        if command.choice.temperature == 0:
            raise ValueError("--n without a --temperature gives the same answer each time: add one, such as 0.7")
    elif command.n > command.beam:
        raise ValueError(f"--n must be at most the --beam's {command.beam}, got {command.n}")
    elif any(getattr(command.choice, name) != getattr(Choice(), name) for name in vars(command.choice)):
        raise ValueError("--beam searches for the likeliest text: leave out --temperature, --stop and the like")


def answer_several(command: Generate, session: Session, cache: Cache, ids: list[int], grammar: Grammar | None) -> int:
    """Print `command.n` answers, and what they took."""
    rows, model, params = sampling(command.choice, session, grammar), session.model, session.params
    begun = time.perf_counter()
    with status() as show:
        announce(show)
        if command.beam:
            out = kvjax.beam(
                model,
                params,
                cache,
                [ids],
                beams=command.beam,
                max_new=command.max_new,
                stop=rows.stop,
                banned=rows.banned,
                grammar=grammar,
            )
        else:
            out = kvjax.sample_n(
                model,
                params,
                cache,
                [ids],
                n=command.n,
                max_new=command.max_new,
                key=jax.random.key(command.choice.seed),
                sampling=rows,
                tokenizer=session.tokenizer,
            )
        lengths = np.asarray(out.lengths)
    seconds, new = time.perf_counter() - begun, int(lengths.sum())
    report = {
        "answers": [_told(out, row, session, command) for row in range(command.n)],
        "prompt_tokens": len(ids),
        "new_tokens": new,
        "load_s": session.load_s,
        "seconds": seconds,
        "tokens_per_s": new / seconds,
        "cache_bytes": kvjax.nbytes(out.cache),
    }
    if command.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        for number, answer in enumerate(report["answers"], 1):
            print(f"[{number}] {answer['mean_logprob']:.2f} a token, ended by {answer['reason']}\n{answer['text']}\n")
    print(dimmed(_summary(report)), file=sys.stderr)
    return 0


def _told(out: Output, row: int, session: Session, command: Generate) -> dict:
    """What a script would read of an answer; `mean_logprob` is by the model's own distribution."""
    stops = command.choice.stop
    answer: Answer = speak(_replayed(out, row), session.tokenizer, stops, lambda piece: None, started=command.raw)
    scores = np.asarray(out.logprobs)[row, : len(answer.tokens)]
    mean = float(scores.mean()) if len(scores) else 0.0
    return {"text": answer.text, "tokens": list(answer.tokens), "reason": answer.reason, "mean_logprob": mean}


def _replayed(out: Output, row: int) -> Generator[Step, None, Output]:
    """A row as `kvjax.stream` would have given it."""
    one = [np.asarray(x)[row : row + 1] for x in (out.tokens, out.logprobs, out.reason)]
    for i in range(int(out.lengths[row])):
        yield Step(one[0][:, i], one[1][:, i], one[2])
    return out._replace(reason=out.reason[row : row + 1])


def _summary(report: dict) -> str:
    parts = [
        f"{len(report['answers'])} answers",
        f"{report['new_tokens']} tokens in {report['seconds']:.2f} s, prefill and compilation included",
        f"{report['tokens_per_s']:.1f} tokens/s",
        f"cache {size(report['cache_bytes'])}",
    ]
    return " · ".join(parts)
