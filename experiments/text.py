"""Ordinary text that every machine has: Python's own help pages."""

from __future__ import annotations

from pydoc_data.topics import topics


def help_pages() -> str:
    """All of them, by the order of their names."""
    return "\n".join(topics[name] for name in sorted(topics))
