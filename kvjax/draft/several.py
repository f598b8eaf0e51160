"""What drafts have in common that are made of several."""

from __future__ import annotations

from typing import Any

from kvjax.config import ModelConfig
from kvjax.draft.base import View, makes_trees, wants_hidden


class Several:
    """All of a draft over `drafts` but what it proposes; a state is one of each.

    Raises:
        ValueError: if there is no draft, or one that makes trees.
    """

    def __post_init__(self: Any):
        name = type(self).__name__
        if not isinstance(self.drafts, tuple):  # as JAX rebuilds it from what are no drafts
            return
        if not self.drafts:
            raise ValueError(f"{name}: `drafts` must name at least one, got ()")
        if trees := [type(draft).__name__ for draft in self.drafts if makes_trees(draft)]:
            raise ValueError(f"{name}: `drafts` must guess one token after the other, got {', '.join(trees)}")

    @property
    def wants_hidden(self: Any) -> bool:
        return any(wants_hidden(draft) for draft in self.drafts)

    def check(self: Any, target: ModelConfig) -> None:
        for draft in self.drafts:
            draft.check(target)

    def init(self: Any, batch: int, size: int) -> tuple[Any, ...]:
        return tuple(draft.init(batch, size) for draft in self.drafts)

    def observe(self: Any, own: tuple[Any, ...], view: View) -> tuple[Any, ...]:
        return tuple(draft.observe(state, view) for draft, state in zip(self.drafts, own, strict=True))
