"""Trained drafts as folders: `draft.json` says of which kind and for which model, `trained/` is a checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import differing
from kvjax.draft.exit import EarlyExit
from kvjax.draft.heads import Heads
from kvjax.model import Params, Transformer
from kvjax.weights.checkpoint import new_folder, restore, save
from kvjax.weights.safetensors_file import read_json

_FORMAT = "kvjax-draft-1"
KINDS = {"heads": Heads, "early-exit": EarlyExit}


def save_draft(path: str | os.PathLike[str], draft: Heads | EarlyExit) -> None:
    """Write what was trained of a draft to a folder that `load_draft` reads; nothing of the target's is written.

    Raises:
        ValueError: if `draft` is not a trained one.
        FileExistsError: if `path` is something other than a draft.
    """
    kind = next((name for name, cls in KINDS.items() if isinstance(draft, cls)), None)
    if kind is None:
        raise ValueError(f"save_draft: `draft` must be Heads or EarlyExit, got {type(draft).__name__}")
    about: dict[str, Any] = {"format": _FORMAT, "kind": kind, "k": draft.k, "target": asdict(draft.target)}
    about["ids"] = int(draft.trained["ids"].size)
    if isinstance(draft, EarlyExit):
        about["layers"] = draft.model.config.layers
    with new_folder(Path(path), "draft.json") as folder:
        save(folder / "trained", draft.trained)
        (folder / "draft.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_draft(
    path: str | os.PathLike[str], model: Transformer, params: Params, *, k: int | None = None
) -> Heads | EarlyExit:
    """Read a trained draft for the model that it was trained on.

    Args:
        path: the folder.
        model, params: the target, whose parameters the draft shares.
        k: guesses a row; as it was saved if None.
    Raises:
        FileNotFoundError: if there is no draft at `path`.
        ValueError: for a draft of another model, naming what differs, or one that is corrupt.
    """
    path = Path(path)
    about = _about(path)
    try:
        if about["format"] != _FORMAT:
            raise ValueError(f"`format` is {about['format']!r}, expected {_FORMAT!r}")
        kind, ids, saved, of = KINDS[about["kind"]], about["ids"], about["target"], about["k"] if k is None else k
        layers = about["layers"] if kind is EarlyExit else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'draft.json'}: not what save_draft writes ({error!r})") from error
    if how := differing(model.config, saved):
        raise ValueError(f"load_draft: {path} was trained for another model: {how}")
    some = np.zeros(ids, np.int32)
    if layers is None:
        like = jax.eval_shape(lambda params: _fresh_heads(model, params, ids), params) | {"ids": some}
        return Heads.of(model, params, trained=restore(path / "trained", like), k=of)
    like = {"norm": params["norm"], "head": jax.eval_shape(lambda x: x[some], params["embed"]), "ids": some}
    return EarlyExit.of(model, params, layers=layers, exit=restore(path / "trained", like), k=of)


def draft_kind(path: str | os.PathLike[str]) -> str:
    """What a folder holds: a name of `KINDS`; raises FileNotFoundError if there is no draft."""
    return str(_about(Path(path)).get("kind"))


def _about(path: Path) -> dict[str, Any]:
    if not (path / "draft.json").exists():
        raise FileNotFoundError(f"load_draft: no draft at {path} (a folder with draft.json, as train_draft writes)")
    return read_json(path / "draft.json")


def _fresh_heads(model: Transformer, params: Params, ids: int) -> dict[str, Any]:
    whole = {"layer": Heads.fresh(model, params, np.zeros(1, np.int32), jax.random.key(0))["layer"]}
    return whole | {"head": jnp.zeros((ids, model.config.hidden), params["embed"].dtype)}
