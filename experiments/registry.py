"""Every experiment by name. A module has a frozen dataclass `Config`, and `run(config, progress)` giving rows.

It may also have `environment(config)`, for versions of what it compares with.
"""

from __future__ import annotations

from collections.abc import Callable

Row = dict[str, object]
"""A line of the table: names to numbers, texts, or short lists of them."""

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of the whole that is behind, 0 to 1."""

EXPERIMENTS = {
    "bench_cpu": "experiments.bench_cpu",
    "cache_quality": "experiments.cache_quality",
    "cache_speed": "experiments.cache_speed",
    "compile_cpu": "experiments.compile_cpu",
    "decode": "experiments.decode",
    "gpu_attention": "experiments.gpu_attention",
    "gpu_model": "experiments.gpu_model",
    "gpu_tune": "experiments.gpu_tune",
    "multi_gpu": "experiments.multi_gpu",
    "prefix_trace": "experiments.prefix_trace",
    "train_draft": "experiments.train_draft",
}
