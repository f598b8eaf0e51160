"""Tables of winners: two tuners lose nothing, and what is damaged is left alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import tuned
from kvjax.accelerate.table import find_row, keep_row, table, table_file
from kvjax.paths import cache_dir


def row(slots, us=1.0, operation="decode"):
    return {
        "operation": operation,
        "exact": {"dtype": "bfloat16", "head_dim": 128},
        "sizes": {"slots": slots},
        "config": {"tile": 64},
        "us": us,
    }


def test_a_row_takes_the_place_of_the_one_for_its_shape(tmp_path):
    for one in (row(512, 3.0), row(256), row(512, 2.0), row(512, 9.0, "prefill")):
        path = keep_row(one, "NVIDIA H200", tmp_path)
    assert path == tmp_path / "nvidia_h200.json" == table_file("NVIDIA H200", tmp_path)
    kept = table("NVIDIA H200", tmp_path)
    assert sorted((r["operation"], r["sizes"]["slots"], r["us"]) for r in kept) == [
        ("decode", 256, 1.0),
        ("decode", 512, 2.0),
        ("prefill", 512, 9.0),
    ]
    assert find_row(kept, "decode", row(512)["exact"], {"slots": 512})["us"] == 2.0
    assert find_row(kept, "decode", row(512)["exact"], {"slots": 511}) is None
    assert find_row(kept, "decode", {"dtype": "bfloat16"}, {"slots": 512}) is None


def test_two_tuners_at_once_lose_nothing(tmp_path):
    def some(worker):
        for i in range(6):
            keep_row(row(1 + 6 * worker + i), "chip", tmp_path)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(some, range(6)))
    assert sorted(r["sizes"]["slots"] for r in table("chip", tmp_path)) == list(range(1, 37))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".lock"}


@pytest.mark.parametrize("text", ["{", '{"version": 7, "rows": []}', "[1]"])
def test_a_file_that_is_no_table_is_left_as_it_is(tmp_path, text):
    path = table_file("chip", tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match="repair or remove it"):
        keep_row(row(512), "chip", tmp_path)
    assert path.read_text() == text


def test_a_row_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected rows with"):
        keep_row({"operation": "decode"}, "chip", tmp_path)
    with pytest.raises(ValueError, match="sizes above 0"):
        keep_row(row(0), "chip", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"KVJAX_CACHE": "~/mine"}, {"XDG_CACHE_HOME": "/x"}, {}])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_kernels_look_where_tables_are_written(monkeypatch, settings, platform):
    for name in ("KVJAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert tuned.user_folder() == cache_dir() / "tuned"
    assert isinstance(tuned.SHIPPED, Path) and tuned.SHIPPED.name == "tuned"
