"""What XLA gets, and what is kept of its work between processes."""

from kvjax.compiler.store import persist

__all__ = ["persist"]
