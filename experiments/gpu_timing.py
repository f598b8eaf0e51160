"""What the experiments on a GPU share: that there is one, and how a work is written."""

from __future__ import annotations

import jax


def require_gpu(name: str) -> None:
    """Refuse to go on where JAX has no NVIDIA GPU.

    Raises:
        RuntimeError: naming the experiment.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"{name}: needs an NVIDIA GPU and `jax[cuda13]`; JAX runs on {jax.default_backend()} here")


def parse_work(name: str, work: str) -> tuple[int, int]:
    """Batch and context of a work.

    Raises:
        ValueError: if it is not `BATCHxCONTEXT`, naming the experiment.
    """
    batch, _, context = work.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
        raise ValueError(f"{name}: `works` must be BATCHxCONTEXT, such as 1x32768, got {work!r}")
    return int(batch), int(context)
