"""Checkpoints and tokenizers: from files to a model, its parameters and its text."""

from kvjax.weights.checkpoint import restore, save, save_model
from kvjax.weights.families import FAMILIES
from kvjax.weights.handover import export_cache, import_cache
from kvjax.weights.loader import Loaded, load
from kvjax.weights.prefix_store import restore_store, save_store
from kvjax.weights.tokenizer import TextStream, Tokenizer

__all__ = [
    "FAMILIES",
    "Loaded",
    "TextStream",
    "Tokenizer",
    "export_cache",
    "import_cache",
    "load",
    "restore",
    "restore_store",
    "save",
    "save_model",
    "save_store",
]
