"""The command line: `kvjax generate | chat | doctor | experiment`.

Nothing here imports JAX: help and wrong arguments answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kvjax.compiler.flags import prefer_wide_vectors

INPUT_ERROR, PIPE_CLOSED, INTERRUPTED = 2, 141, 130


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. By default the most likely one, always."""

    temperature: float = 0.0
    """0 takes the most likely token; 0.7 varies, 1 follows the model's own probabilities."""
    top_k: int = 0
    """Choose among the K most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the best one's probability."""
    repetition: float = 1.0
    """Above 1, tokens that were used already become less likely."""
    presence: float = 0.0
    """Subtracted from the logit of each token that the answer has."""
    frequency: float = 0.0
    """Subtracted once for each time a token is in the answer."""
    seed: int = 0
    """With a temperature: the same seed gives the same text."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not shown."""


@dataclass(frozen=True)
class Where:
    """Which model runs, and how it keeps its keys and values."""

    model: str = "smollm2"
    """`smollm2` (fetched once, 93 MB), a .gguf file, a Hugging Face folder, or a hub id such as org/name."""
    cache: str = "dense"
    """How keys and values are kept: `dense`, or `ring` with settings, as in `ring:window=256,sinks=4`."""
    capacity: int | None = None
    """Tokens the cache has room for. Left out: what is needed, rounded up."""


@dataclass(frozen=True)
class Generate:
    """Continue or answer PROMPT, token by token.

    Example: kvjax generate "Why is the sky blue?" --max-new 64
    """

    prompt: tyro.conf.Positional[str]
    """The text; `-` reads it from standard input."""
    max_new: int = 128
    """At most this many new tokens."""
    raw: bool = False
    """Continue the text as it is, instead of answering it as a user's message."""
    draft: str = ""
    """Guess tokens ahead and check several at once, for the same answer sooner: `lookup`, what followed where the text
    read the same before, `model:PATH`, a smaller model of the same vocabulary, or `heads:PATH` or `early-exit:PATH`,
    trained by the experiments `train_draft` and `train_exit`; with settings: `lookup:k=5`. The first run compiles
    longer."""
    n: int = 1
    """This many answers at once, the prompt held once for all; they differ with a `--temperature`."""
    beam: int = 0
    """Search with this many beams, and print the best text found, or the `--n` best."""
    schema: str = ""
    """Answer with JSON that satisfies this JSON schema: a file, or the schema itself."""
    regex: str = ""
    """Answer with a text that this regular expression matches from end to end."""
    json: bool = False
    """Print one JSON object at the end, instead of text as it comes."""
    where: tyro.conf.OmitArgPrefixes[Where] = field(default_factory=Where)
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)

    def run(self) -> int:
        from kvjax.terminal.generate import run

        return run(self)


@dataclass(frozen=True)
class Chat:
    """Talk with the model; it remembers the conversation in its cache.

    Example: kvjax chat --system "Answer in one sentence." --temperature 0.7
    """

    system: str | None = None
    """What the model is told before the conversation; left out, the model's own default."""
    max_new: int = 512
    """At most this many new tokens an answer."""
    json: bool = False
    """Print one JSON object a turn, instead of text as it comes."""
    where: tyro.conf.OmitArgPrefixes[Where] = field(default_factory=Where)
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)

    def run(self) -> int:
        from kvjax.terminal.chat import run

        return run(self)


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, what is missing, and the line that installs it.

    Example: kvjax doctor
    """

    json: bool = False
    """Print one JSON object."""
    measure: bool = False
    """Measure this device's memory, products and launches first, and keep the figures; it should have nothing else to
    do for these seconds."""

    def run(self) -> int:
        from kvjax.terminal.doctor import run

        return run(self.json, measure=self.measure)


@dataclass(frozen=True)
class Experiment:
    """Run a measurement that a flat YAML file describes, and print its table.

    Any field of the file can be given on the line. Example: kvjax experiment bench_cpu --rounds 3
    """

    config: tyro.conf.Positional[str]
    """A YAML file, or the bare name of one that comes with kvjax, such as `bench_cpu`."""
    json: bool = False
    """Print one JSON object: name, rows, environment, config."""
    record: bool = False
    """Also write that object to experiments/results/NAME.json."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        from experiments.run import run

        return run(self.config, self.overrides, as_json=self.json, record=self.record)


def _named(name: str):
    return tyro.conf.subcommand(name)


Command = (
    Annotated[Generate, _named("generate")]
    | Annotated[Chat, _named("chat")]
    | Annotated[Doctor, _named("doctor")]
    | Annotated[Experiment, _named("experiment")]
)


def parse(args: Sequence[str]) -> Generate | Chat | Doctor | Experiment:
    """The command that a line of arguments names; what is wrong with it ends the process, with 2."""
    about = "Decode language models in JAX with an explicit key/value cache."
    config = (tyro.conf.FlagCreatePairsOff,)
    if args[:1] != ["experiment"] or "--help" in args or "-h" in args:
        return tyro.cli(Command, prog="kvjax", description=about, args=args, config=config)
    command, rest = tyro.cli(
        Experiment, prog="kvjax experiment", args=args[1:], config=config, return_unknown_args=True
    )
    return Experiment(command.config, command.json, command.record, tuple(rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code.

    0 is success, 1 what a command means by it, 2 wrong input (one sentence on standard error), 130 Ctrl-C. With
    `KVJAX_DEBUG=1` errors keep their traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on the machine it compiled for
    prefer_wide_vectors()
    debug = os.environ.get("KVJAX_DEBUG") == "1"
    try:
        return parse(args).run()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"kvjax: {' '.join(str(error).split())}", file=sys.stderr)
        return INPUT_ERROR
