"""From a flat YAML file and `--key value` pairs to an experiment's frozen dataclass."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

from experiments.registry import EXPERIMENTS

FOLDER = Path(__file__).parent / "configs"


def find(name: str) -> Path:
    """The file that a path or a bare name ("bench_cpu") means.

    Raises:
        FileNotFoundError: naming the configs there are.
    """
    bare = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    for path in (Path(name), Path(bare), FOLDER / bare):
        if path.is_file():
            return path
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    raise FileNotFoundError(f"experiment: {name!r} is no file; expected a YAML file or one of {', '.join(known)}")


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[ModuleType, Any]:
    """The experiment's module and its `Config`.

    Raises:
        ValueError: for a file that is no flat mapping, an unknown experiment, an unknown key (with the nearest
            that exists) or a value of the wrong type, naming the key, what was expected and what came.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict) or "experiment" not in data:
        raise ValueError(f"{path}: expected `key: value` lines, one of them `experiment: NAME`")
    name = data.pop("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"{path}: `experiment` must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    module = import_module(EXPERIMENTS[name])
    kinds = typing.get_type_hints(module.Config)
    values = {key: _fit(_named(key, kinds, str(path)), value, kinds[key]) for key, value in data.items()}
    for key, texts in pairs(overrides).items():
        values[key] = _parse(_named(key, kinds, "--" + key), texts, kinds[key])
    absent = [f.name for f in fields(module.Config) if f.name not in values and _required(f)]
    if absent:
        raise ValueError(f"{path}: missing {', '.join(absent)}")
    return module, module.Config(**values)


def pairs(args: Sequence[str]) -> dict[str, list[str]]:
    """`--key value`, `--key=value` and `--key a b c` as texts by key.

    Raises:
        ValueError: for a value that no key stands before.
    """
    found: dict[str, list[str]] = {}
    key = None
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
        elif key is None:
            raise ValueError(f"experiment: expected `--key value`, got {arg!r}")
        else:
            found[key].append(arg)
    return found


def _named(key: object, kinds: Mapping[str, Any], where: str) -> str:
    if not isinstance(key, str) or key not in kinds:  # YAML 1.1 reads the key `on` as true
        close = difflib.get_close_matches(str(key), list(kinds), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(kinds)}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    return key


def _required(field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _parse(key: str, texts: list[str], kind: Any) -> Any:
    """A value from a command line: read as YAML would, and as plain text where only that fits."""
    if typing.get_origin(kind) is tuple:
        with suppress(ValueError, yaml.YAMLError):
            if len(texts) == 1 and isinstance(whole := yaml.safe_load(texts[0]), list):  # --key '[a, b]'
                return _fit(key, whole, kind)
        return tuple(_parse(key, [text], typing.get_args(kind)[0]) for text in texts)
    if not texts and kind is bool:
        return True
    if len(texts) != 1:
        raise ValueError(f"experiment: `{key}` must be {spell(kind)}, got {texts}")
    try:
        return _fit(key, yaml.safe_load(texts[0]), kind)
    except (ValueError, yaml.YAMLError):
        return _fit(key, texts[0], kind)


def _fit(key: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type, where that loses nothing."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_fit(key, item, inner[0]) for item in value)
    if origin in (types.UnionType, typing.Union):
        for option in inner:
            try:
                return _fit(key, value, option)
            except ValueError:
                continue
    elif origin is Literal and value in inner and type(value) in {type(choice) for choice in inner}:
        return value
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a text
        with suppress(ValueError):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"experiment: `{key}` must be {spell(kind)}, got {value!r}")


def spell(kind: Any) -> str:
    """A type as a reader of the file would say it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"a list of {spell(inner[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(spell(option) for option in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))
