"""Bytes against quality, a point a strategy: what `cache_quality` draws, or this module from its recorded result.

`python -m experiments.quality_plot experiments/results/cache_quality.json` draws the PNG of the same name beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from experiments.registry import Row

PANELS = {
    "top1": "top-1 agreement",
    "kl": "KL, nats a token",
    "retrieval": "pass-keys found, question unseen",
}


MOST = 0.9
"""Share of the bytes from which on a cache is not drawn, where another is: what saves nothing needs no room."""


def _number(row: Row, key: str) -> float:
    """A measure of a row."""
    value = row[key]
    assert isinstance(value, (int, float))
    return float(value)


def _named(row: Row) -> tuple[str, str]:
    """A strategy's family and what sets it apart in it, as short as will do."""
    name = str(row["strategy"])
    if ":" not in name:
        family, _, share = name.rpartition(" within ")
        return family or name, share
    family, _, settings = name.partition(":")
    parts = [part for part in settings.split(",") if not part.startswith("dtype=")]
    if "keys=channel" in parts:
        return "KIVI's form", parts[0]
    return family, ",".join(part.removeprefix("score=").removeprefix("budget=") for part in parts)


def draw(rows: Sequence[Row], target: Path) -> None:
    """A panel for each measure that the rows have, against the cache's share of bfloat16's bytes."""
    import_module("matplotlib").use("agg")
    pyplot = import_module("matplotlib.pyplot")

    rows = [row for row in rows if _number(row, "bytes_share") < MOST] or list(rows)
    panels = {key: name for key, name in PANELS.items() if any(row.get(key) is not None for row in rows)}
    count = max(len(panels), 1)
    figure, axes = pyplot.subplots(1, count, figsize=(8 * count, 7), squeeze=False)
    families = list(dict.fromkeys(_named(row)[0] for row in rows))
    for axis, (key, name) in zip(axes[0], panels.items(), strict=False):
        for nth, family in enumerate(families):
            mine = [row for row in rows if _named(row)[0] == family and row.get(key) is not None]
            at = [(_number(row, "bytes_share"), _number(row, key)) for row in mine]
            axis.plot([x for x, _ in at], [y for _, y in at], "o", color=f"C{nth}", label=family)
            for row, point in zip(mine, at, strict=True):
                axis.annotate(_named(row)[1], point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set_xlabel("bytes, share of a full bfloat16 cache")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if key == "kl":
            axis.set_yscale("log")
    axes[0][0].legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    for result in map(Path, sys.argv[1:]):
        draw(json.loads(result.read_text())["rows"], result.with_suffix(".png"))
