"""From stored tensors to the parameter tree of the model: rename, fuse, put in order, check."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kvjax.config import ModelConfig
from kvjax.model import Params, Transformer, param_shapes
from kvjax.weights.families import UNUSED, Family
from kvjax.weights.tensors import Tensor, empty_aligned

Layout = Literal["hf", "gguf"]
_WORKERS = min(4, os.cpu_count() or 1)  # more would wait for the interpreter's lock


class _Part(NamedTuple):
    """One stored tensor and the rows of its target that it fills."""

    name: str
    shape: tuple[int, ...]
    rows: slice
    heads: int


def assemble(tensors: Mapping[str, Tensor], family: Family, layout: Layout, model: Transformer) -> Params:
    """Read every tensor straight into the fused arrays that `model` takes.

    Raises:
        ValueError: naming all tensors that are missing, or all of a wrong shape, or all that the configuration
            has no place for (a forgotten bias would give wrong logits silently).
    """
    tensors = {_plain(name): tensor for name, tensor in tensors.items()}
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(model))
    plan = [(_place(path), leaf, _parts(path, leaf, family, layout, model.config)) for path, leaf in leaves]
    _check(tensors, [part for *_, parts in plan for part in parts], family, layout)

    def build(entry) -> jax.Array:
        place, leaf, parts = entry
        out = empty_aligned(leaf.shape, np.dtype(leaf.dtype))
        for part in parts:
            _fill(out[part.rows], tensors[part.name], part, family, layout, place)
        return jax.device_put(out)

    with ThreadPoolExecutor(_WORKERS) as pool:
        return jax.tree_util.tree_unflatten(tree, list(pool.map(build, plan)))


def _plain(name: str) -> str:
    return name.removeprefix("model.").removeprefix("transformer.")


def _place(path: Any) -> str:
    """`layers.qkv.kernel` for the tree path `["layers"][3]["qkv"]["kernel"]`."""
    return ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _parts(path: Any, leaf: Any, family: Family, layout: Layout, config: ModelConfig) -> list[_Part]:
    place = _place(path)
    layer = next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), None)
    names = [name.format(i=layer) for name in (family.hf if layout == "hf" else family.gguf)[place]]
    heads = [0] * len(names)
    if len(names) == 3:
        sizes = [config.heads * config.head_dim] + [config.kv_heads * config.head_dim] * 2
        heads = [config.heads, config.kv_heads, 0]
    else:
        sizes = [leaf.shape[0] // len(names)] * len(names)
    flip = layout == "hf" and family.transposed and place.endswith("kernel")
    ends = np.cumsum(sizes).tolist()
    shapes = [(size, *leaf.shape[1:]) for size in sizes]
    return [
        _Part(name, shape[::-1] if flip else shape, slice(end - size, end), head)
        for name, shape, size, end, head in zip(names, shapes, sizes, ends, heads, strict=True)
    ]


def _check(tensors: Mapping[str, Tensor], parts: list[_Part], family: Family, layout: Layout) -> None:
    if missing := [part.name for part in parts if part.name not in tensors]:
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    wrong = [
        f"{part.name} is {list(tensors[part.name].shape)} where {list(part.shape)} was expected"
        for part in parts
        if tensors[part.name].shape != part.shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors have a wrong shape: {'; '.join(wrong)}")
    head = (family.hf if layout == "hf" else family.gguf)["head"][0]  # a tied checkpoint may store it twice
    extra = set(tensors) - {part.name for part in parts} - {head}
    if extra := sorted(name for name in extra if not name.endswith(UNUSED)):
        raise ValueError(f"{len(extra)} tensors have no place in this configuration: {', '.join(extra)}")


def _fill(out: np.ndarray, tensor: Tensor, part: _Part, family: Family, layout: Layout, place: str) -> None:
    """Write one tensor into its rows, piece by piece."""
    plus = 1 if layout == "hf" and family.unit_norms and "norm" in place else 0
    order = _unpermuted(len(out), part.heads) if layout == "gguf" and family.permuted and part.heads else None
    if part.shape != out.shape or (layout == "hf" and family.transposed and place.endswith("kernel")):
        out = out.T
    for start, rows in tensor.pieces():
        where = slice(start, start + len(rows)) if order is None else order[start : start + len(rows)]
        out[where] = rows.astype(np.float32) + 1 if plus else rows


def _unpermuted(rows: int, heads: int) -> np.ndarray:
    """Where each row of a GGUF's q or k belongs: pair `i` of a head is stored as rows `2i` and `2i + 1`."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
