"""Settings and states of policies as JSON, with their arrays apart: reading them back runs no code from the file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import numpy as np

_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict}
_PLURALS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, arrays: list[np.ndarray]) -> Any:
    """What `json` can write; arrays are appended to `arrays` and stand as their number.

    Raises:
        TypeError: for what is no number, text, collection, array or dataclass of such.
    """
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return ["array", len(arrays) - 1]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in _MAPPINGS.values():
        return [type(value).__name__, [[encode(key, arrays), encode(item, arrays)] for key, item in value.items()]]
    if type(value) in _PLURALS.values():
        return [type(value).__name__, [encode(item, arrays) for item in value]]
    if is_dataclass(value):
        kind = type(value)
        stored = {f.name: encode(getattr(value, f.name), arrays) for f in fields(value)}
        return ["dataclass", kind.__module__, kind.__qualname__, stored]
    raise TypeError(
        f"save_store: a policy's state may hold numbers, texts, collections, arrays and dataclasses, "
        f"got {type(value).__name__}"
    )


def decode(value: Any, arrays: Sequence[np.ndarray], modules: Collection[str]) -> Any:
    """What `encode` was given.

    Args:
        modules: where dataclasses may come from, with all below them.
    Raises:
        ValueError: for a dataclass from elsewhere, or one that has other fields now.
    """
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag == "array":
        return np.array(arrays[rest[0]])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]((decode(key, arrays, modules), decode(item, arrays, modules)) for key, item in rest[0])
    if tag in _PLURALS:
        return _PLURALS[tag](decode(item, arrays, modules) for item in rest[0])
    module, name, stored = rest
    if not any(module == known or module.startswith(f"{known}.") for known in modules):
        raise ValueError(f"restore_store: the policy is of module {module!r}: give one like it as `policy`")
    kind = getattr(import_module(module), name, None)
    if not (isinstance(kind, type) and is_dataclass(kind)) or [f.name for f in fields(kind)] != list(stored):
        raise ValueError(f"restore_store: {module}.{name} has other fields now than when it was saved")
    made = object.__new__(kind)
    for field, item in stored.items():
        object.__setattr__(made, field, decode(item, arrays, modules))
    return made
