"""Parameters on a mesh: each device has its share of the heads, of the MLP's channels and of the vocabulary.

Source: Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3: the kernels before attention and the MLP's
activation are cut by their outputs, those after them by their inputs, so that a layer needs two sums over devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from kvjax.accelerate.layout import layout_of
from kvjax.config import ModelConfig
from kvjax.mesh import HEADS
from kvjax.model import Params, Transformer, param_shapes

OUTPUTS, INPUTS, WHOLE = PartitionSpec(HEADS), PartitionSpec(None, HEADS), PartitionSpec()

RULES = {
    ("qkv", "kernel"): OUTPUTS,
    ("qkv", "bias"): OUTPUTS,
    ("gate_up", "kernel"): OUTPUTS,
    ("gate_up", "bias"): OUTPUTS,
    ("up", "kernel"): OUTPUTS,
    ("up", "bias"): OUTPUTS,
    ("out", "kernel"): INPUTS,
    ("down", "kernel"): INPUTS,
    ("embed",): OUTPUTS,
    ("head",): OUTPUTS,
}
"""By the end of a parameter's path; all others are whole on each device. Kernels are `[out, in]`, tables by token."""


def shard(model: Transformer, params: Params, mesh: Mesh) -> tuple[Transformer, Params]:
    """The model that runs on a mesh, and its parameters there. What they are given to is the same as without one.

    Caches that strategies make for this model are on the mesh too.

    Raises:
        ValueError: for a model whose heads or MLP the mesh cannot share evenly.
    """
    return model.clone(accelerate=replace(model.accelerate, mesh=mesh)), shard_params(params, model, mesh)


def shard_params(params: Params, model: Transformer, mesh: Mesh) -> Params:
    """Parameters on a mesh, in the order that a model with this mesh reads: see `fused_order`.

    A vocabulary that the devices do not divide is whole on each.

    Raises:
        ValueError: for a model whose heads or MLP the mesh cannot share evenly.
    """
    layout_of(mesh).check(model.config)
    order = _ordering(model.config, mesh.shape[HEADS])
    return jax.tree.map_with_path(  # one after the other: no second copy of all
        lambda path, x, sharding: jax.device_put(order(path, x), sharding), params, param_shardings(model, mesh)
    )


def gather_params(params: Params, model: Transformer) -> Params:
    """Undo `shard_params`, on the host: what a model without a mesh takes, and what is saved.

    Args:
        model: as `shard` gives it.
    Raises:
        ValueError: for a model without a mesh.
    """
    mesh = model.accelerate.mesh
    if mesh is None:
        raise ValueError("gather_params: `model` must be the one that `shard` gave, but it has no mesh")
    order = _ordering(model.config, mesh.shape[HEADS], back=True)
    return jax.tree.map_with_path(lambda path, x: order(path, _host(x)), params)


def param_shardings(model: Transformer, mesh: Mesh) -> Any:
    """Where each parameter lies, as a tree like the parameters: to make them there at once.

    Fused kernels are in another order there (`fused_order`): what was saved goes through `shard_params`.
    """

    def of(path, leaf):
        spec = next((spec for end, spec in RULES.items() if _ends(path, end)), WHOLE)
        axis = spec.index(HEADS) if HEADS in spec else None
        fits = axis is None or leaf.shape[axis] % mesh.shape[HEADS] == 0
        return NamedSharding(mesh, spec if fits else WHOLE)

    return jax.tree.map_with_path(of, param_shapes(model))


def fused_order(sizes: tuple[int, ...], shards: int) -> Int[np.ndarray, "outputs"]:
    """The order of a fused kernel's outputs for which each device's share has its part of every one that is fused.

    `[q | k | v]` becomes `[q0 | k0 | v0 | q1 | …]`. Cut as they are, devices would have parts of others' heads, and
    each step would send activations to where they belong.
    """
    ends = np.cumsum((0, *sizes))
    parts = [np.arange(a, b).reshape(shards, -1) for a, b in zip(ends, ends[1:], strict=False)]
    return np.concatenate(parts, axis=1).reshape(-1)


def _ordering(c: ModelConfig, shards: int, *, back: bool = False):
    """From a parameter's path and its array to the array in the order of devices; `back`, in a model's own."""
    kv = c.kv_heads * c.head_dim
    orders = {
        "qkv": fused_order((c.heads * c.head_dim, kv, kv), shards),
        "gate_up": fused_order((c.intermediate,) * 2, shards),
    }

    def of(path, leaf):
        name = next((name for name in orders if _names(path)[-2:-1] == [name]), None)
        if name is None or shards == 1:
            return leaf
        return leaf[np.argsort(orders[name]) if back else orders[name]]

    return of


def _host(x) -> np.ndarray:
    """A whole array, also one that lies on devices of several processes, each of which then has it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return jax.device_get(x)


def _names(path) -> list[Any]:
    return [getattr(key, "key", getattr(key, "idx", None)) for key in path]


def _ends(path, end: tuple[str, ...]) -> bool:
    return tuple(_names(path)[-len(end) :]) == end
