"""Run one experiment: a config in, a table or one JSON object out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from experiments import config as configs
from experiments.registry import Progress, Row


def run(name: str, overrides: Sequence[str] = (), *, as_json: bool = False, record: bool = False) -> int:
    """Run the experiment that a config describes, show its rows, and return the process's exit code.

    Args:
        name: a YAML file, or the bare name of one that comes with the package.
        overrides: `--key value` pairs; they win over the file.
        as_json: print exactly one object on standard output.
        record: also write it to `results_folder()`.
    """
    path = configs.find(name)
    result = measure(path, overrides)
    if record:
        print(f"written to {write(result)}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(path.stem, result["rows"])
    return 0


def measure(path: Path, overrides: Sequence[str] = ()) -> dict:
    """`{"name", "rows", "environment", "config"}` of one run."""
    from experiments.environment import describe

    module, config = configs.read(path, overrides)
    with progress_on_stderr(path.stem) as progress:
        rows = module.run(config, progress)
    more = module.environment(config) if hasattr(module, "environment") else {}
    return {"name": path.stem, "rows": rows, "environment": describe() | more, "config": asdict(config)}


def results_folder() -> Path:
    """`experiments/results` of the checkout that this package is in, or of the current folder."""
    package = Path(__file__).parent
    checkout = (package.parent / "pyproject.toml").exists()
    return (package if checkout else Path.cwd() / "experiments") / "results"


def write(result: dict, folder: Path | None = None) -> Path:
    """Write the result as NAME.json, whole or not at all."""
    from kvjax.accelerate.storage import write_json

    folder = results_folder() if folder is None else folder
    target = folder / f"{result['name']}.json"
    write_json(target, result)
    return target


def show(title: str, rows: Sequence[Row]) -> None:
    """A table on standard output; tab-separated lines if that is no terminal."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[spell(row.get(column)) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(line) for line in [columns, *cells]))
        return
    from rich.console import Console
    from rich.table import Table

    numbers = {c for c in columns if any(isinstance(row.get(c), (int, float)) for row in rows)}
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def spell(value: object) -> str:
    """A cell: numbers to four digits, lists as a range, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " – ".join(spell(item) for item in value)
    return str(value)


@contextmanager
def progress_on_stderr(title: str):
    """Yields a `Progress`: a bar where a person reads, a line every half minute otherwise."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn, TimeElapsedColumn

    columns = (*Bar.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[doing]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0, doing="")

        def tell(doing: str, done: float) -> None:
            bar.update(task, completed=done, doing=doing)

        yield tell


def _lines(title: str, every_s: float = 30.0) -> Progress:
    told = time.monotonic()

    def tell(doing: str, done: float) -> None:
        nonlocal told
        if time.monotonic() - told >= every_s:
            told = time.monotonic()
            print(f"{title}: {done:.0%}, {doing}", file=sys.stderr, flush=True)

    return tell


__all__ = ["Progress", "measure", "run", "show", "write"]

if __name__ == "__main__":
    from kvjax.cli import main

    sys.exit(main(["experiment", *sys.argv[1:]]))
