"""Read a GGUF file: its metadata, and its tensors dequantised in pieces.

The container is parsed here because `gguf.GGUFReader` takes 2.0 s for the default model (it makes a
numpy array of every token) and this takes 0.05 s; block formats and their arithmetic are the `gguf` package's.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.weights.tensors import PIECE, Tensor

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""Tensor types that are read; more would work, but only these are tested."""

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUF:
    """What a GGUF file holds. Arrays of the metadata are numpy arrays, or lists of strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def tokenizer(self, name: str, default: Any = None) -> Any:
        """The metadata entry `tokenizer.ggml.{name}`."""
        return self.metadata.get(f"tokenizer.ggml.{name}", default)


def read_gguf(path: Path) -> GGUF:
    """Read the metadata and the table of tensors; tensor data stays on disk until it is asked for.

    Raises:
        ValueError: naming the file, if it is no GGUF, is cut short, contradicts itself, or holds a tensor of
            a type outside `SUPPORTED`.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"{path}: not a GGUF file, it has only {path.stat().st_size} bytes")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _parse(path, data)
    except (struct.error, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: the GGUF header is cut short or corrupt ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the GGUF header holds a string that is not UTF-8 ({error})") from error


def _parse(path: Path, data: memoryview) -> GGUF:
    magic, version, tensor_count, entry_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file, it starts with {magic!r} where b'GGUF' was expected")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version 2 or 3 is read, got {version} (a big-endian file looks so too)")
    if max(tensor_count, entry_count) * 12 > len(data):
        raise ValueError(f"{path}: the GGUF header claims {tensor_count} tensors and {entry_count} entries; corrupt?")
    at, metadata = 24, {}
    for _ in range(entry_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    table = []
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (ndim,) = struct.unpack_from("<I", data, at)
        if ndim > 4:
            raise ValueError(f"{path}: tensor {name!r} claims {ndim} dimensions; corrupt?")
        *dims, kind, offset = struct.unpack_from(f"<{ndim}QIQ", data, at + 4)
        at += 16 + 8 * ndim
        table.append((name, tuple(reversed(dims)), kind, offset))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"{path}: `general.alignment` must be a positive integer, got {align!r}")
    base = -(-at // align) * align
    raw = np.frombuffer(data, np.uint8)
    return GGUF(path, metadata, {row[0]: _tensor(path, raw, base, *row) for row in _distinct(path, table)})


def _distinct(path: Path, table: list[tuple]) -> list[tuple]:
    names = [row[0] for row in table]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a tensor is listed twice: {sorted({n for n in names if names.count(n) > 1})}")
    return table


def _string(data: memoryview, at: int) -> tuple[str, int]:
    (size,) = _LENGTH.unpack_from(data, at)
    at += 8
    if size > len(data) - at:
        raise IndexError(f"a string of {size} bytes at byte {at} passes the end")
    return str(data[at : at + size], "utf-8"), at + size


def _value(data: memoryview, at: int, kind: int, depth: int = 0) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if count > len(data) - at or depth > 4:
            raise IndexError(f"an array of {count} entries at byte {at} passes the end")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            if count * dtype.itemsize > len(data) - at:
                raise IndexError(f"an array of {count} entries at byte {at} passes the end")
            return np.frombuffer(data, dtype, count, at), at + count * dtype.itemsize
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner, depth + 1)
            values.append(value)
        return values, at
    if kind not in _SCALARS:
        raise IndexError(f"unknown value type {kind} at byte {at}")
    dtype = np.dtype(_SCALARS[kind])
    if dtype.itemsize > len(data) - at:
        raise IndexError(f"a number at byte {at} passes the end")
    return np.frombuffer(data, dtype, 1, at)[0].item(), at + dtype.itemsize


def _tensor(path: Path, raw: np.ndarray, base: int, name: str, shape: tuple, kind: int, offset: int) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {GGMLQuantizationType[t].value: GGMLQuantizationType[t] for t in SUPPORTED}
    if kind not in known:
        names = {t.value: t.name for t in GGMLQuantizationType}
        raise ValueError(
            f"{path}: tensor {name!r} has type {names.get(kind, kind)}; types read are {', '.join(SUPPORTED)}"
        )
    block, size = GGML_QUANT_SIZES[known[kind]]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"{path}: tensor {name!r} of type {known[kind].name} has the impossible shape {list(shape)}")
    count = math.prod(shape) // block * size
    start = base + offset
    if start + count > raw.size:
        raise ValueError(
            f"{path}: cut short: tensor {name!r} ends at byte {start + count}, the file has {raw.size} bytes"
        )
    return Tensor(shape, partial(_pieces, raw[start : start + count], shape, known[kind], block, size))


def _pieces(data: np.ndarray, shape: tuple, kind: Any, block: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Dequantise whole rows, about `PIECE` elements at a time."""
    from gguf.quants import dequantize

    rows, width = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    step = max(1, PIECE // width // 128 * 128 or PIECE // width)
    data = data.reshape(rows, -1)
    for start in range(0, rows, step):
        part = data[start : start + step]
        # `dequantize` loops in Python over every 16 rows of what it gets: long rows make that few and wide
        wide = math.gcd(part.size // size, 4096 // block)
        values = dequantize(part.reshape(-1, wide * size), kind)
        yield start, values.reshape(shape) if len(shape) == 1 else values.reshape(-1, *shape[1:])
