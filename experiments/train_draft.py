"""Train a draft on the model's own text, and time it on text unseen in training.

The model answers prompts, its hidden states at the answers are kept, and the draft learns from them. What is done is
kept in `out`: the same command goes on where it was left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import draft_prompts
from experiments.decode import PLAIN, compare, row
from experiments.registry import Progress, Row
from kvjax.draft import EarlyExit, Heads, distill, save_draft

EVERY_S = 120.0
"""Between two checkpoints of the training."""


@dataclass(frozen=True)
class Config:
    """The fields of `train_draft.yaml` and `train_exit.yaml`.

    Args:
        model: as `kvjax.load` takes it.
        out: a folder for the draft, `out/draft`, and for what a later run goes on from.
        kind: of draft.
        layers: of the target, for `early-exit`.
        ids: tokens that can be guessed: the most frequent ones.
        rows: prompts to train on; half of the answers are greedy, half drawn at `warmth`.
        new: tokens an answer, at most.
        batch: answers at a time.
        epochs, lot, rate: passes over the rows, rows an update, and the highest learning rate.
        steps, feature: see `kvjax.draft.distill.HeadsLesson`.
        k: guesses at a time, at most.
        unseen: prompts to test on.
        turns: of timing, after one that warms up.
    """

    model: str = "smollm2"
    out: str = "drafts/heads"
    kind: Literal["heads", "early-exit"] = "heads"
    layers: int = 4
    ids: int = 6144
    rows: int = 768
    new: int = 160
    batch: int = 32
    warmth: float = 0.7
    epochs: int = 8
    lot: int = 8
    rate: float = 1e-3
    steps: int = 2
    feature: float = 0.1
    k: int = 4
    unseen: int = 16
    turns: int = 2

    def __post_init__(self):
        for name in ("layers", "ids", "rows", "new", "batch", "epochs", "lot", "steps", "k", "unseen", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"train_draft: `{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("warmth", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train_draft: `{name}` must be above 0, got {getattr(self, name)}")
        if self.rows % self.lot:
            raise ValueError(f"train_draft: `rows` must be a multiple of `lot`, {self.lot}, got {self.rows}")


def run(config: Config, progress: Progress) -> list[Row]:
    """Text, training, test: one row for each way to decode the unseen prompts."""
    began = time.monotonic()
    model, params, tokenizer = kvjax.load(config.model)
    if tokenizer is None:
        raise ValueError(f"train_draft: {config.model} has no tokenizer, and the prompts are text")
    work = [_encoded(tokenizer, text) for text in draft_prompts.training(config.rows)]
    test = [_encoded(tokenizer, text) for text in draft_prompts.unseen(config.unseen)]
    text = _answers(config, model, params, tokenizer, work, "train", lambda x: progress("answers", 0.3 * x))
    seen = _answers(config, model, params, tokenizer, test, "unseen", lambda x: progress("test answers", 0.3))
    tell(f"text: {int(text.length.sum()):,} tokens, {time.monotonic() - began:.0f} s")
    vocab = model.config.vocab
    ids = jnp.asarray(distill.frequent(_said(text), min(config.ids, vocab), vocab, tokenizer.stop_ids))
    tell(f"{ids.size} ids are {np.isin(np.concatenate(_said(seen)), np.asarray(ids)).mean():.1%} of the unseen text")
    trained, shares = _trained(config, model, params, ids, text, seen, lambda x: progress("training", 0.4 + 0.5 * x))
    draft = made(config, model, params, trained)
    save_draft(Path(config.out) / "draft", draft)
    taken = time.monotonic() - began
    tell(f"trained in {taken:.0f} s of this run, written to {Path(config.out) / 'draft'}")
    progress("timing", 0.9)
    sampling = kvjax.Sampling(stop=tokenizer.stop_ids)
    timings, differing, costs = compare(
        model, params, test, 1, {config.kind: draft}, config.new, config.turns, sampling, lambda x: None
    )
    rows = [row(name, "unseen", 1, timings, differing[name], costs[name]) for name in (PLAIN, config.kind)]
    rows[1] |= {"trained_s": taken, "expected": float(shares.sum()), "shares": shares.tolist()}
    return rows


def made(config: Config, model, params, trained: dict[str, Any]) -> Heads | EarlyExit:
    if config.kind == "heads":
        return Heads.of(model, params, trained=trained, k=config.k)
    return EarlyExit.of(model, params, layers=config.layers, exit=trained, k=config.k)


def _encoded(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]))


def _answers(config: Config, model, params, tokenizer, prompts, name: str, done) -> distill.Text:
    """What the model says to each prompt, kept in `out` batch by batch. Unseen prompts are answered greedily."""
    layer = config.layers if config.kind == "early-exit" else None
    needed = [config.model, config.new, config.warmth, config.batch, layer, prompts]
    folder = Path(config.out) / f"text-{name}-{hashlib.sha256(json.dumps(needed).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, len(prompts), config.batch):
        part, file = prompts[first : first + config.batch], folder / f"{first}.npz"
        if not file.exists():
            warmth = [0.0 if name == "unseen" or i % 2 == 0 else config.warmth for i in range(len(part))]
            sampling = [kvjax.Sampling(temperature=t, stop=tokenizer.stop_ids) for t in warmth]
            key = jax.random.key(first)
            text = distill.answers(model, params, part, new=config.new, sampling=sampling, key=key, layer=layer)
            fresh = file.with_suffix(".part")
            with fresh.open("wb") as stream:
                np.savez(stream, **text._asdict())
            fresh.replace(file)
        with np.load(file) as kept:
            parts.append(distill.Text(**kept))
        done((first + len(part)) / len(prompts))
    return distill.Text(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _said(text: distill.Text) -> list[np.ndarray]:
    """Each row's answer."""
    return [row[1 : length + 1] for row, length in zip(text.tokens, text.length, strict=True)]


def _trained(config: Config, model, params, ids, text: distill.Text, seen: distill.Text, done):
    """What was trained, and the shares of places where the first 1, 2, … guesses are right; resumed if it can be."""
    heads = config.kind == "heads"
    fresh = Heads.fresh(model, params, ids, jax.random.key(0)) if heads else EarlyExit.fresh(model, params, ids)
    lesson = distill.HeadsLesson(model, config.steps, config.feature) if heads else distill.ExitLesson(model)
    fixed, each = distill.fixed(model, params, fresh), config.rows // config.lot
    if heads:
        fresh = distill.fitted(model, fresh, fixed, text)
    total = each * config.epochs
    course, path = distill.begin(fresh, config.rate, total), _course_folder(config)
    if (path / "manifest.json").exists():
        course = kvjax.restore(path, course)
        tell(f"going on from update {int(course.step)} of {total}")
    began = saved = time.monotonic()
    start, losses, shares = int(course.step), [], _accepted(config, lesson, course, fixed, seen)
    tell(f"before: {_spelt(shares)}")
    for step in range(start, total):
        order = np.random.default_rng(step // each).permutation(config.rows)
        rows = order[step % each * config.lot :][: config.lot]
        course, loss = distill.update(lesson, course, fixed, text.take(rows), rate=config.rate, total=total)
        losses.append(float(loss))
        last = step + 1 == total
        if last or (step + 1) % max(each // 2, 1) == 0:
            shares = _accepted(config, lesson, course, fixed, seen)
            left = (time.monotonic() - began) / (step + 1 - start) * (total - step - 1)
            tell(f"update {step + 1} of {total}: loss {np.mean(losses):.3f}, {_spelt(shares)}, {left:.0f} s left")
            losses = []
        if last or time.monotonic() - saved > EVERY_S:
            kvjax.save(path, course)
            saved = time.monotonic()
        done((step + 1) / total)
    return course.weights | {"ids": ids}, shares


def _course_folder(config: Config) -> Path:
    """A folder of its own for each way to train."""
    testing = ("out", "k", "unseen", "turns")
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in testing}
    return Path(config.out) / f"course-{hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]}"


def _accepted(config: Config, lesson, course, fixed, seen: distill.Text) -> np.ndarray:
    parts = [slice(first, first + 16) for first in range(0, len(seen.length), 16)]
    weights = [int(seen.length[part].sum()) for part in parts]
    shares = [distill.accepted(lesson, course.weights, fixed, seen.take(part), k=config.k) for part in parts]
    return np.average(np.stack([np.asarray(x) for x in shares]), axis=0, weights=weights)


def _spelt(shares: np.ndarray) -> str:
    return f"{shares.sum():.2f} guesses right on unseen text ({' '.join(f'{x:.2f}' for x in shares)})"


def tell(line: str) -> None:
    print(f"train_draft: {line}", file=sys.stderr, flush=True)
