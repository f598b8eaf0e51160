"""Decode language models in JAX with an explicit key/value cache."""

from kvjax import cache, decode
from kvjax.cache import Cache, fork, nbytes
from kvjax.config import ModelConfig, Precision, Rope
from kvjax.decode import Output, Sampling, decode_step, forward, generate, prefill, stream
from kvjax.model import Transformer, init_params, param_shapes
from kvjax.version import __version__
from kvjax.weights import load, restore, save, save_model

__all__ = [
    "Cache",
    "ModelConfig",
    "Output",
    "Precision",
    "Rope",
    "Sampling",
    "Transformer",
    "__version__",
    "cache",
    "decode",
    "decode_step",
    "fork",
    "forward",
    "generate",
    "init_params",
    "load",
    "nbytes",
    "param_shapes",
    "prefill",
    "restore",
    "save",
    "save_model",
    "stream",
]
