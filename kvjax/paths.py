"""Where kvjax keeps what it fetched and compiled."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    r"""The user's cache folder for kvjax; it is not created here.

    `KVJAX_CACHE` if set, else the platform's own place: `$XDG_CACHE_HOME/kvjax` or `~/.cache/kvjax` on
    Linux, `~/Library/Caches/kvjax` on macOS, `%LOCALAPPDATA%\kvjax` on Windows.
    """
    if chosen := os.environ.get("KVJAX_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvjax"
