"""Winners of the tuner as JSON by device: written here, read by `kernels.tuned` where kernels are traced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels import tuned
from kvjax.accelerate.storage import change_json

KEY = ("operation", "exact", "sizes")
"""What says which shape a row is for."""

SHIPPED = tuned.SHIPPED
"""The folder of tables that come with the package."""


def table_file(device: str, folder: Path | None = None) -> Path:
    """A device's table in a folder, the user's own if None."""
    return (tuned.user_folder() if folder is None else folder) / tuned.file_name(device)


def table(device: str, folder: Path | None = None) -> tuple[dict[str, Any], ...]:
    """The rows of a device's table; none if there is no table, or it is not as it should be, after one warning."""
    return tuned.rows(table_file(device, folder))


def find_row(
    rows: tuple[dict[str, Any], ...], operation: str, exact: Mapping[str, int | str], sizes: Mapping[str, int]
) -> dict[str, Any] | None:
    """The row for this very shape, if there is one."""
    key = {"operation": operation, "exact": dict(exact), "sizes": dict(sizes)}
    return next((row for row in rows if all(row[name] == key[name] for name in KEY)), None)


def keep_row(row: dict[str, Any], device: str, folder: Path | None = None) -> Path:
    """Put a row into a device's table in the place of the one for the same shape; two tuners lose nothing.

    Programs that are traced from here on may use it.

    Raises:
        OSError: if the table cannot be written.
        ValueError: if the file holds something else, which is left as it is; or the row is none.
    """
    path = table_file(device, folder)
    tuned.parsed(json.dumps({"version": tuned.VERSION, "rows": [row]}))

    def change(held: Any) -> dict[str, Any]:
        try:
            old = () if held is None else tuned.parsed(json.dumps(held))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; repair or remove it") from error
        rest = [other for other in old if any(other[name] != row[name] for name in KEY)]
        rows = sorted([*rest, row], key=lambda row: json.dumps([row[name] for name in KEY], sort_keys=True))
        return {"version": tuned.VERSION, "rows": rows}

    change_json(path, change)
    tuned.forget()
    return path
