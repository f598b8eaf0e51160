from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest

from experiments import config
from experiments.registry import EXPERIMENTS


@dataclass(frozen=True)
class Fields:
    steps: int
    rate: float = 0.5
    name: str = "a"
    kind: Literal["slow", "fast"] = "slow"
    warm: bool = False
    seeds: tuple[int, ...] = (0,)
    most: int | None = None


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", "toy")
    monkeypatch.setattr(config, "import_module", lambda name: SimpleNamespace(Config=Fields))

    def read(text, *overrides):
        path = tmp_path / "toy.yaml"
        path.write_text("experiment: toy\n" + text)
        return config.read(path, overrides)[1]

    return read


def test_file_and_line_together(read):
    assert read("steps: 3\nrate: 1\nseeds: [1, 2]") == Fields(3, rate=1.0, seeds=(1, 2))
    line = [
        "--steps",
        "4",
        "--seeds",
        "5",
        "6",
        "--name=7",
        "--warm",
        "--most",
        "9",
        "--kind",
        "fast",
        "--rate",
        "1e-3",
    ]
    assert read("steps: 3", *line, "--rate", "1e-3") == Fields(4, 1e-3, "7", "fast", True, (5, 6), 9)
    assert read("steps: 3\nmost: 2", "--most", "null").most is None
    assert read("steps: 3", "--warm", "false").warm is False
    assert read("steps: 3", "--seeds", "[5, 6]").seeds == (5, 6)
    assert read("steps: 3", "--seeds", "[]").seeds == ()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps: 3\nrats: 1", [], r"toy.yaml: unknown key 'rats'; did you mean 'rate'\?"),
        ("steps: 3\nqqq: 1", [], "unknown key 'qqq'; expected one of steps, rate"),
        ("steps: 3", ["--sed", "1"], r"--sed: unknown key 'sed'; did you mean 'seeds'\?"),
        ("steps: three", [], "`steps` must be an integer, got 'three'"),
        ("steps: true", [], "`steps` must be an integer, got True"),
        ("steps: 1.5", [], "`steps` must be an integer, got 1.5"),
        ("steps: 3\nseeds: 1", [], "`seeds` must be a list of an integer, got 1"),
        ("steps: 3\nseeds: [a]", [], "`seeds` must be an integer, got 'a'"),
        ("steps: 3\nkind: fat", [], "`kind` must be one of 'slow', 'fast', got 'fat'"),
        ("steps: 3\nmost: x", [], "`most` must be an integer or null, got 'x'"),
        ("steps: 3\non: 1", [], "unknown key True"),
        ("steps: 3\nrate: fast", [], "`rate` must be a number, got 'fast'"),
        ("steps: 3\nwarm: 1", [], "`warm` must be true or false, got 1"),
        ("steps: 3", ["--steps", "1", "2"], "`steps` must be an integer, got ..1"),
        ("steps: 3", ["stray"], "expected `--key value`, got 'stray'"),
        ("rate: 1", [], "missing steps"),
        ("steps: [", [], "not YAML"),
    ],
)
def test_wrong_configs_name_the_key(read, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(text, *overrides)


def test_unknown_experiment_and_no_mapping(tmp_path):
    path = tmp_path / "x.yaml"
    for text, message in (("experiment: nothing", "must be one of bench_cpu"), ("- 1", "expected `key: value` lines")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            config.read(path)


def test_configs_are_found_by_path_and_by_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("bench_cpu") == config.FOLDER / "bench_cpu.yaml"
    (tmp_path / "mine.yaml").write_text("")
    assert config.find("mine").name == config.find("mine.yaml").name == "mine.yaml"
    with pytest.raises(FileNotFoundError, match="'none' is no file; expected a YAML file or one of bench_cpu"):
        config.find("none")


@pytest.mark.parametrize("path", sorted(config.FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_can_be_read(path):
    module, made = config.read(path)
    assert callable(module.run) and isinstance(made, module.Config)
