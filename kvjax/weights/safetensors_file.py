"""Read the `*.safetensors` files of a Hugging Face folder, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from kvjax.weights.tensors import PIECE, Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict:
    """The JSON object in a file, or a `ValueError` naming the file and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, still on disk.

    `model.safetensors.index.json` names the shards; without it `model.safetensors` is read, or else every
    `*.safetensors` there.

    Raises:
        FileNotFoundError: if there is no safetensors file, or shards of the index are not there.
        ValueError: naming the file, if one is cut short or corrupt.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{index}: `weight_map` must map tensor names to file names")
        files = [folder / name for name in sorted(set(shards.values()))]
        if lost := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"{folder}: shards named by {index.name} are missing: {', '.join(lost)}")
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors file (PyTorch .bin files are not read: they run code)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of one file by name; others (masks, counters) are left out."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return {
            name: Tensor(tuple(part.get_shape()), partial(_pieces, file, name, tuple(part.get_shape())))
            for name, part in slices.items()
            if part.get_dtype() in _FLOATS
        }
    except SafetensorError as error:
        raise ValueError(f"{path}: the safetensors file is cut short or corrupt: {error}") from error


def _pieces(file, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    if len(shape) < 2:
        yield 0, file.get_tensor(name)
        return
    part, step = file.get_slice(name), max(1, PIECE // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield start, part[start : min(start + step, shape[0])]
