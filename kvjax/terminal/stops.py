"""Showing text as it comes without ever showing part of a stop text."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cut:
    """Text that may become a stop text is held back; what follows a stop text is dropped, and it too.

    Args:
        stops: the stop texts.
        held: what may be the beginning of one.
        met: one was found; nothing more comes.
    """

    stops: tuple[str, ...]
    held: str = ""
    met: bool = False

    def push(self, text: str) -> tuple[Cut, str]:
        """The state after more text, and what may be shown now."""
        if self.met:
            return self, ""
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            return replace(self, held="", met=True), text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        return replace(self, held=text[len(text) - keep :]), text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
