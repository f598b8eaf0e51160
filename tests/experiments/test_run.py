import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from experiments import run
from experiments.registry import EXPERIMENTS
from kvjax import cli
from kvjax.accelerate import storage


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (1, 2)


def rows(config, progress):
    progress("counting", 0.5)
    print("chatter", file=sys.stderr)
    return [{"size": size, "speed": size / 3, "range": [0.5, 1.0]} for size in config.sizes] + [{"note": "last"}]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    module = ModuleType("toy_experiment")
    module.Config, module.run, module.environment = Config, rows, lambda config: {"peers": {"x": "1"}}
    monkeypatch.setitem(sys.modules, "toy_experiment", module)
    monkeypatch.setitem(EXPERIMENTS, "toy", "toy_experiment")
    path = tmp_path / "small.yaml"
    path.write_text("experiment: toy\n")
    return str(path)


def test_json_is_one_object(toy, capsys):
    assert cli.main(["experiment", toy, "--sizes", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "small" and result["config"] == {"sizes": [3]}
    assert result["rows"][0] == {"size": 3, "speed": 1.0, "range": [0.5, 1.0]}
    environment = result["environment"]
    assert environment["peers"] == {"x": "1"}
    for key in ("date", "commit", "dirty", "python", "jax", "jaxlib", "platform", "device", "cpu", "cores"):
        assert key in environment


def test_plain_table_where_nobody_watches(toy, capsys):
    assert cli.main(["experiment", toy]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["size", "speed", "range", "note"],
        ["1", "0.3333", "0.5 – 1", ""],
        ["2", "0.6667", "0.5 – 1", ""],
        ["", "", "", "last"],
    ]


def test_record_writes_the_object_whole_or_not_at_all(toy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    monkeypatch.setattr(run, "results_folder", lambda: folder)
    assert cli.main(["experiment", toy, "--record", "--json"]) == 0
    assert json.loads((folder / "small.json").read_text()) == json.loads(capsys.readouterr().out)

    before = (folder / "small.json").read_text()
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert cli.main(["experiment", toy, "--record"]) == 2
    assert (folder / "small.json").read_text() == before
    assert [path.name for path in folder.iterdir()] == ["small.json"]


def test_wrong_field_is_bad_input(toy, capsys):
    assert cli.main(["experiment", toy, "--size", "3"]) == 2
    assert "unknown key 'size'; did you mean 'sizes'?" in capsys.readouterr().err


def test_numbers_that_are_none_are_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write({"name": "x", "rows": [{"speed": float("nan")}]}, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


def test_long_work_tells_a_log_where_it_is(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with run.progress_on_stderr("counting") as tell:
        tell("one", 0.1)
        tell("two", 0.5)
        tell("three", 0.9)
    assert capsys.readouterr().err == "counting: 50%, two\n"
