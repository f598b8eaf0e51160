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


def draw(rows: Sequence[Row], target: Path) -> None:
    """A panel for each measure that the rows have, against the cache's share of bfloat16's bytes."""
    import_module("matplotlib").use("agg")
    pyplot = import_module("matplotlib.pyplot")

    panels = {key: name for key, name in PANELS.items() if any(row.get(key) is not None for row in rows)}
    figure, axes = pyplot.subplots(1, max(len(panels), 1), figsize=(6 * max(len(panels), 1), 5), squeeze=False)
    families = list(dict.fromkeys(str(row["strategy"]).partition(":")[0] for row in rows))
    for axis, (key, name) in zip(axes[0], panels.items(), strict=False):
        for number, family in enumerate(families):
            mine = [r for r in rows if str(r["strategy"]).partition(":")[0] == family and r.get(key) is not None]
            axis.plot([r["bytes_share"] for r in mine], [r[key] for r in mine], "o", color=f"C{number}", label=family)
            for row in mine:
                label = str(row["strategy"]).partition(":")[2].replace("dtype=bfloat16", "").strip(",")
                at = (row["bytes_share"], row[key])
                axis.annotate(label, at, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set_xlabel("bytes, share of a full bfloat16 cache")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    for result in map(Path, sys.argv[1:]):
        draw(json.loads(result.read_text())["rows"], result.with_suffix(".png"))
