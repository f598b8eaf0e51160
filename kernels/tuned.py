"""Sizes of kernels that were measured to be the fastest: JSON files by device, read while a program is traced.

A file holds `{"version": 1, "rows": [row, …]}`. A row says for which `operation`, for which `exact` settings and for
which `sizes` its `config` won; the rest of it says how it was measured. Files that come with the package are in
`kernels/tuned/`; a user's own, which win, in `tuned/` of kvjax's cache folder. Writing them is the tuner's work, in
`kvjax.accelerate`. A program that is compiled already keeps the sizes that it was traced with.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

VERSION = 1
"""Of the files; others are not read."""

FAR = 2.0
"""Times by which a size may differ from one that was tuned."""

SHIPPED = Path(__file__).parent / "tuned"

Config = TypeVar("Config")


def tuned(
    operation: str,
    default: Config,
    *,
    exact: Mapping[str, int | str],
    sizes: Mapping[str, int],
    device: str | None = None,
) -> Config:
    """The config that won for this operation and shape, else `default`, a frozen dataclass.

    Exact settings must be equal. Sizes may differ, by a factor of `FAR` at most: the row whose sizes are nearest in
    the sum of their logarithms is taken, an equal one first of all.

    Args:
        device: as `file_name` has it; None asks JAX for its first NVIDIA GPU.
    """
    device = gpu() if device is None else device
    if device is None:
        return default
    for folder in (user_folder(), SHIPPED):
        config = nearest(rows(folder / file_name(device)), operation, exact, sizes)
        if config is None:
            continue
        if not config.keys() <= {field.name for field in fields(default)}:  # ty: ignore[invalid-argument-type]
            _warn(f"{folder / file_name(device)}: {operation} has {config}, which {default} has no room for")
            continue
        return replace(default, **config)  # ty: ignore[invalid-argument-type]
    return default


def nearest(
    rows: tuple[dict[str, Any], ...], operation: str, exact: Mapping[str, int | str], sizes: Mapping[str, int]
) -> dict[str, Any] | None:
    """The config of the row that is nearest to a shape; None if none is near."""
    best, config = math.inf, None
    for row in rows:
        same = row["operation"] == operation and row["exact"] == exact and row["sizes"].keys() == sizes.keys()
        if not same:
            continue
        apart = [abs(math.log2(row["sizes"][name] / size)) for name, size in sizes.items()]
        if max(apart, default=0.0) <= math.log2(FAR) and sum(apart) < best:
            best, config = sum(apart), row["config"]
    return config


@cache
def rows(path: Path) -> tuple[dict[str, Any], ...]:
    """What a file holds, read once; none if there is no file, and after one warning if it is not as it should be."""
    try:
        return parsed(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, ValueError) as error:
        _warn(f"{path}: {error}")
        return ()


def parsed(text: str) -> tuple[dict[str, Any], ...]:
    """The rows of a file's text.

    Raises:
        ValueError: if it is no such file, saying what was expected.
    """
    data = json.loads(text)
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(f"expected a table of version {VERSION}, got {version!r}")
    held = data.get("rows")
    kinds = {"operation": str, "exact": dict, "sizes": dict, "config": dict}
    if not isinstance(held, list):
        raise ValueError(f"expected `rows` to be a list, got {held!r}")
    for row in held:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"expected rows with {', '.join(kinds)}, got {row!r}")
        if not all(isinstance(size, int) and size > 0 for size in row["sizes"].values()):
            raise ValueError(f"expected sizes above 0, got {row['sizes']!r}")
    return tuple(held)


def forget() -> None:
    """Read files anew from here on: one was written."""
    rows.cache_clear()


def file_name(device: str) -> str:
    """A device's file: `file_name("NVIDIA H200")` is "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


@cache
def gpu() -> str | None:
    """What JAX's first NVIDIA GPU is called; None if it sees none."""
    import jax

    try:
        return jax.local_devices(backend="cuda")[0].device_kind
    except RuntimeError:
        return None


def user_folder() -> Path:
    """`tuned` in kvjax's cache folder, found as `kvjax.paths.cache_dir` finds it, which is not imported here."""
    if chosen := os.environ.get("KVJAX_CACHE"):
        return Path(chosen).expanduser() / "tuned"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvjax" / "tuned"


@cache
def _warn(trouble: str) -> None:
    """Once for each trouble."""
    warnings.warn(f"tuned sizes are left out: {trouble}", stacklevel=4)
