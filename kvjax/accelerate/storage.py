"""JSON files that several processes may write: whole or not at all, and never over what another one added."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


def write_json(path: Path, data: Any) -> None:
    """Put `data` in the place of whatever the file held; a reader sees the old or the new, never a part.

    Raises:
        OSError: if it cannot be written; then the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace what a JSON file holds, None if there is none, by what `change` makes of it, one process at a time.

    Raises:
        OSError: if it cannot be written.
        ValueError: if it holds something that is no JSON, which is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            held = json.loads(path.read_text())
        except FileNotFoundError:
            held = None
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): repair or remove it") from error
        write_json(path, change(held))
