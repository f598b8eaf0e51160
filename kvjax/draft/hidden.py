"""What the target's head sees, on its way to drafts that ask for it; nothing is computed for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.draft.base import Draft, wants_hidden
from kvjax.model import Transformer, with_hidden


def asked(spec: Any, draft: Draft, model: Transformer) -> Any:
    """A speculation with room for hidden states, if its draft asks for them."""
    if not wants_hidden(draft):
        return spec
    kept = np.zeros((spec.length.shape[0], draft.most + 1, model.config.hidden), model.precision.compute)
    return replace(spec, hidden=jnp.asarray(kept), fresh=jnp.zeros_like(spec.length))


def scored(model, params, spec: Any, tokens, lengths, cache, *, last: bool):
    """Logits, the cache after, and what the head saw, None where no draft asks."""
    if spec.hidden is not None:
        return with_hidden(model, params, tokens, lengths, cache, last=last)[:3]
    return *model.apply({"params": params}, tokens, lengths, cache, last=last), None


def kept(spec: Any, hidden, made: Int[Array, "batch"]) -> Any:
    """With `hidden` of each row's first `made` checked tokens for the draft to look at."""
    if hidden is None:
        return spec
    held = jax.lax.dynamic_update_slice_in_dim(spec.hidden, hidden, 0, axis=1)
    return replace(spec, hidden=held, fresh=made)
