"""Files are written whole or not at all."""

import json

import pytest

from kvjax.accelerate import storage


def test_a_write_that_fails_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        storage.write_json(path, {"a": float("nan")})

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        storage.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
