"""Settings of XLA that pay for a decoding loop."""

from __future__ import annotations

import os

WIDE = "--xla_cpu_prefer_vector_width=512"


def prefer_wide_vectors() -> None:
    """Let XLA use 512-bit vectors on a CPU that has them; a width in the user's `XLA_FLAGS` wins.

    For programs, which own their process: it must run before JAX compiles anything, and does nothing after.
    SmolLM2 in float32 at batch 1 gains 1 to 3 % on Sapphire Rapids.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {WIDE}".strip()
