"""What the target's head sees, on its way to drafts that ask for it; nothing is computed for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array, Int

from kvjax.compact import Compact
from kvjax.model import with_hidden


def scored(model, params, spec: Any, tokens, lengths, cache, *, last: bool, places: Compact | None = None):
    """Logits, the cache after, and what the head saw, None where no draft asks."""
    if spec.hidden is not None:
        return with_hidden(model, params, tokens, lengths, cache, last=last, places=places)[:3]
    return *model.apply({"params": params}, tokens, lengths, cache, last=last, places=places), None


def kept(spec: Any, hidden, made: Int[Array, "batch"]) -> Any:
    """With `hidden` of each row's first `made` checked tokens for the draft to look at."""
    if hidden is None:
        return spec
    held = jax.lax.dynamic_update_slice_in_dim(spec.hidden, hidden, 0, axis=1)
    return replace(spec, hidden=held, fresh=made)
