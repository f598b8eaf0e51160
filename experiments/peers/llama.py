"""llama.cpp through `llama-cpp-python`'s low-level calls, with the settings that are best for each work."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import llama_cpp as c  # ty: ignore[import-not-found]  # an optional peer
import numpy as np

from experiments.peers.work import ROOT, Timing, Work

TYPES = {"f16": 1, "f32": 0, "q8_0": 8}
"""K/V types by their number in ggml."""

TUNING_TOKENS = 24


@dataclass(frozen=True)
class Settings:
    """What tuning chooses among. `unified` keeps all sequences' keys in one buffer."""

    flash: bool
    kv: str
    ubatch: int
    unified: bool

    def __str__(self) -> str:
        flash = "on" if self.flash else "off"
        return f"flash_attn {flash}, K/V {self.kv}, ubatch {self.ubatch}" + (", unified K/V" if self.unified else "")


class Llama:
    """A model file; contexts are made for each measurement, outside the clock."""

    def __init__(self, model: str, threads: int, repack: bool, kv: Sequence[str]):
        c.llama_backend_init()
        c.llama_log_set(_quiet, None)
        params = c.llama_model_default_params()
        params.use_extra_bufts = repack
        self.model = c.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp: {model} cannot be loaded")
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.threads, self.repack, self.kv = threads, repack, kv
        self.best: dict[str, Settings] = {}

    def measure(self, work: Work) -> Timing:
        if work.name not in self.best:
            self.best[work.name] = self._tune(work)
        settings = self.best[work.name]
        said = str(settings) + ("" if self.repack else ", weights not repacked (crashes on this machine)")
        return replace(self._run(work, settings), settings=said)

    def _tune(self, work: Work) -> Settings:
        """Try every setting that bears on the work, and once more the two fastest."""
        short = replace(work, new=min(work.new, TUNING_TOKENS))
        flash_kv = [(flash, kv) for kv in self.kv for flash in (True, False) if flash or kv != "q8_0"]
        ubatches = (512,) if work.new else (512, 256, 128)
        unified = (False, True) if work.batch > 1 else (False,)
        options = [
            Settings(flash, kv, ubatch, one)
            for (flash, kv), ubatch, one in itertools.product(flash_kv, ubatches, unified)
        ]
        spent = {option: self._run(short, option).seconds for option in options}
        finals = sorted(options, key=lambda option: spent[option])[:2]
        return min(finals, key=lambda option: min(spent[option], self._run(short, option).seconds))

    def _run(self, work: Work, settings: Settings) -> Timing:
        context = self._context(work, settings)
        try:
            return self._timed(context, work)
        finally:
            c.llama_free(context)

    def _context(self, work: Work, settings: Settings):
        params = c.llama_context_default_params()
        params.n_seq_max = work.batch
        params.n_ctx = work.batch * (-(-(work.context + work.new + 1) // 256) * 256)
        params.n_batch = max(512, work.batch * work.context)
        params.n_ubatch = settings.ubatch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(settings.flash)
        params.type_k = params.type_v = TYPES[settings.kv]
        params.kv_unified = settings.unified
        params.no_perf = True
        context = c.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError(f"llama.cpp: no context with {settings}")
        return context

    def _timed(self, context, work: Work) -> Timing:
        rows = range(work.batch)
        batch = c.llama_batch_init(work.batch * work.context, 0, 1)
        try:
            cells = [(token, at, row) for row in rows for at, token in enumerate(work.prompts[row])]
            begun = time.perf_counter()
            wanted = {(row + 1) * work.context - 1 for row in rows}
            tokens = [self._decode(context, batch, cells, wanted)]
            if not work.new:
                return Timing(time.perf_counter() - begun, tokens[0])
            begun = time.perf_counter()
            for at in range(work.context, work.context + work.new):
                cells = [(token, at, row) for row, token in zip(rows, tokens[-1], strict=True)]
                tokens.append(self._decode(context, batch, cells, set(rows)))
            return Timing(time.perf_counter() - begun, [row[0] for row in tokens])
        finally:
            c.llama_batch_free(batch)

    def _decode(self, context, batch, cells, wanted: set[int]) -> list[int]:
        """Feed `(token, position, row)` cells; the most likely next token after each wanted one."""
        batch.n_tokens = len(cells)
        for i, (token, at, row) in enumerate(cells):
            batch.token[i], batch.pos[i] = token, at
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = i in wanted
        if code := c.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp: llama_decode gave {code}")
        views = (c.llama_get_logits_ith(context, i) for i in sorted(wanted))
        return [int(np.ctypeslib.as_array(view, (self.vocab,)).argmax()) for view in views]


@c.llama_log_callback
def _quiet(level, text, data) -> None:
    return None


_PROBE = (
    "import sys; sys.path.append(sys.argv[1]); from experiments.peers import llama; "
    "llama.Llama(sys.argv[2], int(sys.argv[3]), True, ['f16']).measure(llama.Work('decode-1-64', [[1] * 64], 1))"
)


def make(model: str, threads: int, kv: Sequence[str] = tuple(TYPES)) -> Llama:
    """The engine; `kv` are the K/V types that tuning may choose.

    llama.cpp repacks quantised weights for the processor's matrix units, and where a virtual machine forbids those
    it dies of it. So that is tried in another process first.
    """
    probe = [sys.executable, "-c", _PROBE, str(ROOT), model, str(threads)]
    lives = subprocess.run(probe, capture_output=True, timeout=300, check=False).returncode == 0
    return Llama(model, threads, repack=lives, kv=kv)
