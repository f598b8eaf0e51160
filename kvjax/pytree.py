"""Frozen dataclasses that are JAX pytrees: how all of kvjax's data is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**settings):
    """A field that is part of the tree's structure, and so of the compiled program, instead of a leaf."""
    return field(metadata={"static": True}, **settings)


@dataclass_transform(frozen_default=True, field_specifiers=(field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree.

    Field annotations say what the leaves are between transformations. Inside JAX they may be shapes,
    stacked arrays or placeholders, so annotations are not checked when a tree is put together.
    """
    cls = jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))
    setattr(cls, "__no_type_check__", True)  # noqa: B010 - read by jaxtyping's import hook in the tests
    return cls
