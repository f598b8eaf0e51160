"""Attention kernels and their references. Imports jax only; kvjax calls it from one place."""

__version__ = "0.1.0"
