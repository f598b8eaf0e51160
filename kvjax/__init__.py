"""Decode language models in JAX with an explicit key/value cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvjax.version import __version__

if TYPE_CHECKING:
    from kvjax import batch, cache, decode, draft, grammar
    from kvjax.batch import serve
    from kvjax.cache import Cache, fork, nbytes
    from kvjax.config import Acceleration, ModelConfig, Precision, Rope
    from kvjax.decode import (
        Output,
        Sampling,
        beam,
        best_of,
        decode_step,
        forward,
        generate,
        majority,
        prefill,
        sample_n,
        stream,
    )
    from kvjax.draft import speculate
    from kvjax.model import Transformer, init_params, param_shapes
    from kvjax.weights import export_cache, import_cache, load, restore, restore_store, save, save_model, save_store

_HOMES = {
    "kvjax.batch": ("serve",),
    "kvjax.cache": ("Cache", "fork", "nbytes"),
    "kvjax.config": ("Acceleration", "ModelConfig", "Precision", "Rope"),
    "kvjax.decode": (
        "Output",
        "Sampling",
        "beam",
        "best_of",
        "decode_step",
        "forward",
        "generate",
        "majority",
        "prefill",
        "sample_n",
        "stream",
    ),
    "kvjax.draft": ("speculate",),
    "kvjax.model": ("Transformer", "init_params", "param_shapes"),
    "kvjax.weights": (
        "export_cache",
        "import_cache",
        "load",
        "restore",
        "restore_store",
        "save",
        "save_model",
        "save_store",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = ("batch", "cache", "decode", "draft", "grammar")

__all__ = [
    "Acceleration",
    "Cache",
    "ModelConfig",
    "Output",
    "Precision",
    "Rope",
    "Sampling",
    "Transformer",
    "__version__",
    "batch",
    "beam",
    "best_of",
    "cache",
    "decode",
    "decode_step",
    "draft",
    "export_cache",
    "fork",
    "forward",
    "generate",
    "grammar",
    "import_cache",
    "init_params",
    "load",
    "majority",
    "nbytes",
    "param_shapes",
    "prefill",
    "restore",
    "restore_store",
    "sample_n",
    "save",
    "save_model",
    "save_store",
    "serve",
    "speculate",
    "stream",
]


def __getattr__(name: str):
    """Import a public name at its first use: `kvjax --help` answers before JAX has loaded."""
    if name in _ROOMS:
        return import_module(f"kvjax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
