"""Save and restore any pytree bit for bit through Orbax: parameters, a cache, a decoding state, a tuner's state.

A checkpoint is a folder: `leaves/` is Orbax's, and `manifest.json` lists every leaf by its path in the tree, so that
a tree that does not fit is refused with names before anything is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig, Precision, Rope
from kvjax.model import Transformer, param_shapes
from kvjax.weights.safetensors_file import read_json
from kvjax.weights.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvjax.weights.loader import Loaded

_FORMAT = "kvjax-tree-1"
_MODEL_FORMAT = "kvjax-model-1"
_SHOWN = 5
_SCALARS = (bool, int, float)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a pytree of arrays, typed PRNG keys and Python numbers to the folder `path`, whole or not at all.

    Args:
        path: the folder to make; an earlier checkpoint there is replaced.
        tree: any pytree; leaves may have any dtype, no elements, or be sharded.
    Raises:
        FileExistsError: if `path` is something other than a checkpoint.
        TypeError: naming a leaf that is no array and no number.
    """
    leaves = _leaves(tree)
    manifest = {"format": _FORMAT, "leaves": [_describe(name, leaf) for name, leaf in leaves]}
    stored = {
        str(i): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for i, (_, leaf) in enumerate(leaves)
        if not isinstance(leaf, _SCALARS) and np.size(leaf)
    }
    with new_folder(Path(path), "manifest.json") as folder:
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if stored:
            import orbax.checkpoint as ocp

            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(folder.resolve() / "leaves", stored)


def restore(path: str | os.PathLike[str], like: Any) -> Any:
    """Read the pytree that `save` wrote.

    Args:
        path: the folder.
        like: a tree of the same structure, shapes and dtypes, of arrays or `jax.ShapeDtypeStruct`s; arrays come back
            with its leaves' shardings, numpy arrays as numpy arrays.
    Raises:
        FileNotFoundError: if there is no checkpoint at `path`.
        ValueError: naming the first leaves that differ from `like`, or a checkpoint that is corrupt.
    """
    path = Path(path)
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(f"restore: no checkpoint at {path} (a folder with manifest.json, as kvjax.save writes)")
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("leaves"), list):
        raise ValueError(f"restore: {path / 'manifest.json'} is not of format {_FORMAT}")
    leaves = _leaves(like)
    _compare(path, manifest["leaves"], [_describe(name, leaf) for name, leaf in leaves])
    wanted = {
        str(i): leaf
        for i, (_, leaf) in enumerate(leaves)
        if not isinstance(leaf, _SCALARS) and int(np.prod(leaf.shape))
    }
    arrays = _read(path, wanted) if wanted else {}
    values = []
    for i, ((_, leaf), row) in enumerate(zip(leaves, manifest["leaves"], strict=True)):
        if isinstance(leaf, _SCALARS):
            values.append(type(leaf)(row["value"]))
        elif str(i) not in arrays:
            values.append(np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else _empty(leaf, row))
        elif _is_key(leaf):
            values.append(jax.random.wrap_key_data(jnp.asarray(arrays[str(i)]), impl=row["dtype"].removeprefix("key ")))
        elif isinstance(leaf, np.ndarray | np.generic) or _is_placed(leaf):
            values.append(arrays[str(i)])
        else:
            values.append(jnp.asarray(arrays[str(i)]))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), values)


def save_model(path: str | os.PathLike[str], loaded: Loaded) -> None:
    """Write a model, its parameters and its tokenizer to a folder that `kvjax.load` reads.

    Args:
        path: the folder to make; an earlier model there is replaced.
        loaded: what `kvjax.load` returned, or any `(model, params, tokenizer or None)`.
    Raises:
        FileExistsError: if `path` is something other than a saved model.
        ValueError: for a model on a mesh, whose parameters are in the order that its devices need.
    """
    model, params, tokenizer = loaded
    if model.accelerate.mesh is not None:
        raise ValueError(
            "save_model: expected a model of one device, got one on a mesh: save the model that was sharded, with "
            "`kvjax.accelerate.gather_params(params, model)`"
        )
    about: dict[str, Any] = {"format": _MODEL_FORMAT, "config": asdict(model.config)}
    about["precision"] = asdict(model.precision)
    with new_folder(Path(path), "kvjax.json") as folder:
        save(folder / "params", params)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
            fields = {name: value for name, value in vars(tokenizer).items() if name not in ("inner", "pieces")}
            about["tokenizer"] = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in fields.items()}
        (folder / "kvjax.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_model(path: Path, precision: Precision) -> Loaded:
    """Read what `save_model` wrote; the weights are cast to `precision.params` if they were kept in another dtype."""
    from kvjax.weights.loader import Loaded

    about = read_json(path / "kvjax.json")
    try:
        if about["format"] != _MODEL_FORMAT:
            raise ValueError(f"`format` is {about['format']!r}")
        raw = about["config"]
        rope = None if raw["rope"] is None else Rope(**raw["rope"])
        config = ModelConfig(**raw | {"rope": rope, "windows": tuple(raw["windows"])})
        saved = Precision(**about["precision"])
        tokenizer = _tokenizer(path, about["tokenizer"]) if "tokenizer" in about else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'kvjax.json'}: not what kvjax.save_model writes ({error!r})") from error
    params = restore(path / "params", param_shapes(Transformer(config, saved)))
    model = Transformer(config, precision)
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, param_shapes(model))
    return Loaded(model, params, tokenizer)


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Inner

    typed: dict[str, Any] = fields | {name: frozenset(fields[name]) for name in ("special", "added")}
    typed["stop_ids"] = tuple(fields["stop_ids"])
    try:
        typed["inner"] = Inner.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    return Tokenizer(**typed)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, _SCALARS):
        return {"path": name, "shape": [], "dtype": f"python {type(leaf).__name__}", "value": leaf}
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or leaf.dtype == object:
        raise TypeError(f"save: leaf {name or '(the tree itself)'} must be an array or a number, got {type(leaf)}")
    dtype = f"key {_impl(leaf)}" if _is_key(leaf) else str(leaf.dtype)
    return {"path": name, "shape": list(leaf.shape), "dtype": dtype}


def _impl(leaf: Any) -> str:
    """The name of a key's generator; JAX tells it of a key, but not of a key's dtype alone."""
    if isinstance(leaf, jax.Array):
        return str(jax.random.key_impl(leaf))
    known = ("threefry2x32", "rbg", "unsafe_rbg")
    return next((name for name in known if jax.random.key(0, impl=name).dtype == leaf.dtype), str(leaf.dtype))


def _compare(path: Path, saved: list[dict], wanted: list[dict]) -> None:
    """Refuse another structure, shape or dtype, naming the first few leaves."""
    have, want = ({row["path"]: (row["shape"], row["dtype"]) for row in rows} for rows in (saved, wanted))
    lines = [f"{name or '(root)'} is only in the checkpoint" for name in have if name not in want]
    lines += [f"{name or '(root)'} is not in the checkpoint" for name in want if name not in have]
    lines += [
        f"{name or '(root)'} is {have[name][1]}{have[name][0]} where {kind}{shape} was expected"
        for name, (shape, kind) in want.items()
        if name in have and have[name] != (shape, kind)
    ]
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ValueError(f"restore: {path} holds another tree: {'; '.join(lines[:_SHOWN])}{more}")


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    def how(leaf: Any) -> Any:
        if _is_placed(leaf):
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                path.resolve() / "leaves",
                args=ocp.args.PyTreeRestore(
                    item=dict.fromkeys(wanted, 0), restore_args={name: how(leaf) for name, leaf in wanted.items()}
                ),
            )
    except Exception as error:  # Orbax and tensorstore raise every kind
        raise ValueError(f"restore: the checkpoint at {path} is incomplete or corrupt: {error}") from error


def _is_placed(leaf: Any) -> bool:
    """Whether a leaf says where it wants to be. Others stay uncommitted, as new arrays are: one compile serves both."""
    if _is_key(leaf) or getattr(leaf, "sharding", None) is None:
        return False
    return not isinstance(leaf, jax.Array) or leaf.committed


def _empty(leaf: Any, row: dict) -> jax.Array:
    if _is_key(leaf):
        impl = row["dtype"].removeprefix("key ")
        shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
        return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, *shape), "uint32"), impl=impl)
    return jnp.zeros(leaf.shape, leaf.dtype)


@contextlib.contextmanager
def new_folder(path: Path, mark: str) -> Generator[Path]:
    """A fresh folder beside `path` that takes its place when all went well; `mark` is a file only ours have."""
    if path.exists() and not (path / mark).exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"save: {path} exists and is no checkpoint of this kind; give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        yield fresh
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                shutil.move(old, path)
            raise
