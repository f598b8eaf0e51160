"""Flags that the command line gives to XLA."""

import os

import pytest

from kvjax.compiler.flags import WIDE, prefer_wide_vectors


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, WIDE),
        ("--xla_dump_to=x", f"--xla_dump_to=x {WIDE}"),
        ("--xla_cpu_prefer_vector_width=128", "--xla_cpu_prefer_vector_width=128"),
    ],
)
def test_the_users_flags_stay(before, after, monkeypatch):
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    prefer_wide_vectors()
    assert os.environ["XLA_FLAGS"] == after
