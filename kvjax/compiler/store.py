"""Compiled programs kept on disk, so that the next process starts without compiling.

JAX's own persistent cache does the storing. Around it stands what a default needs: a folder that the user
never has to name, and files that were cut short or changed thrown away before JAX meets them. JAX would read
such a file at every start, warn, compile, and leave it as it is.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

SUFFIX = "-cache"
"""How JAX ends the name of an entry."""

KNOWN = "checked.json"
"""The entries found whole, by name: their size and time of change."""

MOST = 4 * 2**30
"""Bytes kept; beyond them the programs that were not read for longest go."""

_ZSTD = b"\x28\xb5\x2f\xfd"


def persist(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs in `folder`, for this process and later ones.

    Settings that the user made win: a `jax_compilation_cache_dir` of their own, and `KVJAX_COMPILE_CACHE=0`,
    which turns this off. Calling it again costs nothing. Several processes may share a folder.

    Args:
        folder: None means `compiled` in kvjax's cache folder.
    Returns:
        The folder in use, or None if programs are kept in memory only: turned off, or (after one warning) the
        folder cannot be written.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # ty: ignore[missing-attribute]  # config makes them at run time
    if chosen is not None:
        return Path(chosen)
    if os.environ.get("KVJAX_COMPILE_CACHE") == "0":
        return None
    path = default_folder() if folder is None else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        clean(path)
    except OSError as error:
        warnings.warn(
            f"persist: compiled programs are kept in memory only, because {path} cannot be written ({error}); "
            "set KVJAX_CACHE to a folder that can, or KVJAX_COMPILE_CACHE=0 to silence this",
            stacklevel=2,
        )
        return None
    _turn_on(path)
    atexit.register(_clean_quietly, path)  # so that the next start has nothing to check
    return path


def default_folder() -> Path:
    """Where compiled programs go unless the caller says otherwise."""
    from kvjax.paths import cache_dir

    return cache_dir() / "compiled"


def clean(folder: Path, most: int = MOST) -> list[str]:
    """Remove entries that were changed or cut short, and the least recently read ones beyond `most` bytes.

    An entry that was whole once is trusted while its size and time of change stay the same, so a start costs
    one look at each file's metadata.

    Returns:
        The names of the files removed.
    Raises:
        OSError: if the folder cannot be read or written.
    """
    known = _read_known(folder)
    stats = {entry.name: entry.stat() for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    good = {
        name: stamp
        for name, stamp in stamps.items()
        if known.get(name) == stamp or (name not in known and is_whole(folder / name))
    }
    total = sum(size for size, _ in good.values())
    for name in sorted(good, key=lambda name: stats[name].st_atime_ns):
        if total <= most:
            break
        total -= good.pop(name)[0]
    removed = sorted(stamps.keys() - good.keys())
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    if good != known:
        _write_known(folder, good)
    return removed


def is_whole(path: Path) -> bool:
    """Whether JAX could decompress this entry: zlib's checksum, or zstandard's frame where that is installed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    try:
        if data.startswith(_ZSTD):
            return _zstd_whole(data)
        zlib.decompress(data)
    except zlib.error:
        return False
    return True


def _zstd_whole(data: bytes) -> bool:
    try:
        import zstandard  # ty: ignore[import-not-found]  # JAX's own optional dependency
    except ImportError:
        return True
    try:
        zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError:
        return False
    return True


def _turn_on(path: Path) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # 24 small programs cost 0.6 s together
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Another process may be half-way through writing an entry: this one compiles it, and that is all.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    compilation_cache.reset_cache()  # JAX decides once, at its first compile, whether there is a cache


def _read_known(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / KNOWN).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_known(folder: Path, known: dict[str, list[int]]) -> None:
    handle, name = tempfile.mkstemp(dir=folder, prefix=KNOWN)
    with os.fdopen(handle, "w") as file:
        json.dump(known, file)
    os.replace(name, folder / KNOWN)


def _clean_quietly(folder: Path) -> None:
    """At exit; the folder may be gone by then, or the disk full."""
    try:
        clean(folder)
    except OSError:
        return
