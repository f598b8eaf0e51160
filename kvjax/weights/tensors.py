"""A stored tensor, whatever file it is in: its shape, and its values in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

PIECE = 1 << 18
"""Elements read at a time: a piece and its temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Args:
        shape: rows first, as numpy has it.
        pieces: yields `(first row, rows)` in order, each a float array of about `PIECE` elements.
    """

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[tuple[int, np.ndarray]]]

    def read(self) -> np.ndarray:
        """The whole tensor as float32."""
        out = np.empty(self.shape, np.float32)
        for start, rows in self.pieces():
            out[start : start + len(rows)] = rows
        return out


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
