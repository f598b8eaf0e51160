"""The cache folder on each platform."""

import sys
from pathlib import Path

import pytest

from kvjax.paths import cache_dir


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"KVJAX_CACHE": "/data/kv", "XDG_CACHE_HOME": "/x"}, "/data/kv"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/kvjax"),
        ("linux", {}, "/home/me/.cache/kvjax"),
        ("darwin", {}, "/home/me/Library/Caches/kvjax"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/kvjax"),
    ],
)
def test_cache_dir(platform, variables, expected, monkeypatch):
    for name in ("KVJAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache_dir() == Path(expected)
