"""A line on standard error that says what is going on, where a person reads along."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def status(quiet: bool = False):
    """Show a spinner while the block runs; yields a function that changes its text, and hides it for None.

    Shows nothing if standard error is no terminal, or `quiet`. However the block ends, the line and the hidden
    cursor are put back.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console

    spinner = Console(stderr=True).status("", spinner="dots")

    def show(text: str | None) -> None:
        if text is None:
            spinner.stop()
        else:
            spinner.update(text)
            spinner.start()

    try:
        yield show
    finally:
        spinner.stop()


Show = Callable[[str | None], None]
Status = AbstractContextManager[Show]


def _ignore(text: str | None) -> None:
    return None


def dimmed(text: str) -> str:
    """Text in the terminal's faint style, if standard error is one."""
    return f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text


def size(count: int) -> str:
    """Bytes in human units: `size(11_300_000)` is "11.3 MB"."""
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
