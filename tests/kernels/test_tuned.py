"""Tuned sizes are found by exact settings and near sizes; whatever is wrong with a file, the default is taken."""

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from kernels import tuned


@dataclass(frozen=True)
class Sizes:
    tile: int = 64
    stages: int = 2


EXACT = {"dtype": "bfloat16", "head_dim": 128}


def row(slots, config, rows=8, **exact):
    sizes = {"rows": rows, "slots": slots}
    return {"operation": "decode", "exact": EXACT | exact, "sizes": sizes, "config": config}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A writer of tables: into the user's folder, or the package's."""
    tuned.forget()
    tuned._warn.cache_clear()
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "package")

    def write(where, rows):
        folder = tuned.user_folder() if where == "user" else tuned.SHIPPED
        folder.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else json.dumps({"version": tuned.VERSION, "rows": rows})
        (folder / "chip_1.json").write_text(text)
        tuned.forget()

    yield write
    tuned.forget()


def found(slots, rows=8, default=Sizes(), device="Chip 1", operation="decode", **exact):  # noqa: B008
    sizes = {"rows": rows, "slots": slots}
    return tuned.tuned(operation, default, exact=EXACT | exact, sizes=sizes, device=device)


def test_the_nearest_shape_wins_within_a_factor_of_two(folders):
    folders("package", [row(1024, {"tile": 1}), row(4096, {"tile": 2}), row(4096, {"tile": 3}, rows=16)])
    assert found(1024) == Sizes(1) and found(4096) == Sizes(2)
    assert found(1500) == Sizes(1) and found(3000) == Sizes(2) and found(512) == Sizes(1)
    assert found(500) == Sizes() and found(9000) == Sizes()
    assert found(4096, rows=12) == Sizes(3) and found(4096, rows=11) == Sizes(2)
    assert found(1024, rows=17) == Sizes()


def test_settings_must_be_equal(folders):
    folders("package", [row(1024, {"tile": 1})])
    assert found(1024, head_dim=64) == Sizes() and found(1024, dtype="float16") == Sizes()
    assert found(1024, window=7) == Sizes() and found(1024, operation="prefill") == Sizes()
    assert found(1024, device="Chip 2") == Sizes()


def test_the_users_own_win(folders):
    folders("package", [row(1024, {"tile": 1}), row(8192, {"tile": 4, "stages": 3})])
    folders("user", [row(2048, {"tile": 2})])
    assert found(1024) == Sizes(2)  # even where the package has the very shape
    assert found(8192) == Sizes(4, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ('{"version": 0, "rows": []}', "version 1, got 0"),
        ('{"version": 1}', "`rows` to be a list"),
        ('{"version": 1, "rows": [{"operation": "decode"}]}', "expected rows with"),
        (json.dumps({"version": 1, "rows": [row(0, {})]}), "sizes above 0"),
    ],
)
def test_a_damaged_table_is_left_out_with_one_warning(folders, text, said):
    folders("package", [row(1024, {"tile": 1})])
    folders("user", text)
    with pytest.warns(UserWarning, match=said) as told:
        assert found(1024) == found(1024) == Sizes(1)
    assert len(told) == 1


def test_a_config_of_another_kernel_is_left_out(folders):
    folders("user", [row(1024, {"tile": 5, "warps": 4})])
    folders("package", [row(1024, {"tile": 1})])
    with pytest.warns(UserWarning, match="warps"):
        assert found(1024) == Sizes(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(1024) == Sizes(1)  # told once


def test_without_a_gpu_the_default_is_taken(folders, monkeypatch):
    folders("package", [row(1024, {"tile": 1})])
    monkeypatch.setattr(tuned, "gpu", lambda: None)
    assert found(1024, device=None) == Sizes()
    monkeypatch.setattr(tuned, "gpu", lambda: "Chip 1")
    assert found(1024, device=None) == Sizes(1)


def test_files_are_read_once(folders, monkeypatch):
    folders("user", [row(1024, {"tile": 1})])
    assert found(1024) == Sizes(1)
    (tuned.user_folder() / "chip_1.json").unlink()
    assert found(1024) == Sizes(1)
    tuned.forget()
    assert found(1024) == Sizes()


def test_it_needs_neither_kvjax_nor_jax():
    code = (
        "import sys; from kernels.tuned import tuned; from kernels.decode_plan import Tiling;"
        "tuned('decode', Tiling(), exact={}, sizes={}, device='none such');"
        "print(any(name.partition('.')[0] == 'kvjax' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    code = "import sys, kernels.tuned; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
