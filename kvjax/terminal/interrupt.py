"""Ctrl-C, so that it neither gets lost nor lands in the middle of a step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def noticing() -> Generator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second press raises KeyboardInterrupt at once."""
    with _counting(raise_from=2) as presses:
        yield lambda: bool(presses)


@contextmanager
def insisting() -> Generator[Callable[[], bool]]:
    """Ctrl-C raises KeyboardInterrupt, and raises it again when the yielded function is called or the block ends.

    Python drops an exception that a signal handler raises inside a C callback or a finaliser, and loading and
    compiling have many of both; what it would say of that is left unsaid. The function gives False, so it can be asked
    as `noticing`'s is.
    """
    with _counting(raise_from=1) as presses, _unsaid():

        def check() -> bool:
            if presses:
                raise KeyboardInterrupt
            return False

        yield check
        check()


@contextmanager
def _unsaid() -> Generator[None]:
    """Without "Exception ignored in …" for a KeyboardInterrupt that Python drops."""
    before = sys.unraisablehook

    def hook(dropped) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _counting(raise_from: int) -> Generator[list[int]]:
    presses: list[int] = []

    def note(number, frame) -> None:
        presses.append(number)
        if len(presses) >= raise_from:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
