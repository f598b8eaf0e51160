"""The process around one engine: JSON lines in, JSON lines out.

`{"work": …}` is answered by a timing, `{"text": …}` by token ids where the engine has a tokenizer, and the end of
the input ends it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module

from experiments.peers.work import Work

ENGINES = {
    "kvjax": "experiments.peers.ours",
    "transformers": "experiments.peers.hugging",
    "llama.cpp": "experiments.peers.llama",
}
"""Module of each kind of engine; it has `make(**options)`."""


def main(kind: str, options: str) -> None:
    """Serve one engine until standard input ends. What libraries print goes to standard error."""
    settings = json.loads(options)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    engine = import_module(ENGINES[kind]).make(**settings)
    reply("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "text" in request:
            reply(engine.tokens(request["text"]))
        else:
            reply(asdict(engine.measure(Work(**request["work"]))))
