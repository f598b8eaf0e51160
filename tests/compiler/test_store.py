import os
import subprocess
import sys
import time
import zlib

import jax
import pytest

from kvjax.compiler import persist, store

PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
from kvjax.compiler import persist
import jax, jax.numpy as jnp
if "early" in sys.argv:
    jax.jit(lambda x: x + 1)(1.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(persist(sys.argv[1]))
y = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((64, 64)))
print(float(y), sum(e.endswith("/cache_hits") for e in hits), sum(e.endswith("/cache_misses") for e in hits))
"""


def start(folder, *flags, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "KVJAX_"))}
    command = [sys.executable, "-c", PROGRAM, str(folder), *flags]
    return subprocess.Popen(command, env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    folder, numbers = out.strip().splitlines()
    value, hits, misses = numbers.split()
    return folder, float(value), int(hits), int(misses), err


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.name.endswith(store.SUFFIX))


def test_second_process_compiles_nothing_and_scribbled_entries_are_made_anew(tmp_path):
    _, value, hits, misses, _ = finish(start(tmp_path, "early"))  # a compile before `persist` must not turn it off
    assert hits == 0 and misses > 0
    made = entries(tmp_path)
    assert len(made) == misses
    _, again, hits, missed, err = finish(start(tmp_path))
    assert (again, hits, missed, err) == (value, misses, 0, "")

    for path in made:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, again, hits, missed, err = finish(start(tmp_path))
    assert (again, hits, missed, err) == (value, 0, misses, "")
    _, again, hits, missed, _ = finish(start(tmp_path))
    assert (again, hits, missed) == (value, misses, 0)


def test_two_processes_at_once(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    (_, one, *_), (_, two, *_) = map(finish, both)
    assert one == two


def test_users_settings_win(tmp_path):
    other, ours = tmp_path / "other", tmp_path / "ours"
    assert finish(start(ours, JAX_COMPILATION_CACHE_DIR=str(other)))[0] == str(other)
    assert not ours.exists()
    assert finish(start(ours, KVJAX_COMPILE_CACHE="0"))[0] == "None"
    assert not ours.exists()


@pytest.fixture
def unset():
    """JAX as it is before anyone configured a folder."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_unwritable_folder_warns_and_goes_on(tmp_path, unset, monkeypatch):
    monkeypatch.delenv("KVJAX_COMPILE_CACHE", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="kept in memory only, because .*file/compiled"):
        assert persist(tmp_path / "file" / "compiled") is None
    assert jax.config.jax_compilation_cache_dir is None


def put(folder, name, data=b"x" * 100, when=None):
    path = folder / f"{name}{store.SUFFIX}"
    path.write_bytes(zlib.compress(data))
    if when is not None:
        os.utime(path, (when, when))
    return path


def test_clean_trusts_what_is_unchanged(tmp_path, monkeypatch):
    put(tmp_path, "a")
    (tmp_path / "unrelated").write_text("stays")
    assert store.clean(tmp_path) == []
    monkeypatch.setattr(store, "is_whole", lambda path: pytest.fail("read again"))
    assert store.clean(tmp_path) == []
    assert (tmp_path / "unrelated").exists()


def test_clean_removes_changed_and_broken_entries(tmp_path):
    good, changed = put(tmp_path, "good"), put(tmp_path, "changed")
    store.clean(tmp_path)
    changed.write_bytes(zlib.compress(b"another program"))  # whole, and yet not what JAX wrote under this name
    broken = tmp_path / f"broken{store.SUFFIX}"
    broken.write_bytes(b"scribble")
    assert store.clean(tmp_path) == sorted([broken.name, changed.name])
    assert entries(tmp_path) == [good]


def test_clean_survives_a_scribbled_list(tmp_path):
    put(tmp_path, "a")
    for text in ("{", "[1]", '{"a": 3}'):
        (tmp_path / store.KNOWN).write_text(text)
        assert store.clean(tmp_path) == []


def test_clean_drops_the_least_recently_read(tmp_path):
    now = time.time()
    old, young = put(tmp_path, "old", os.urandom(400), now - 100), put(tmp_path, "young", os.urandom(400), now)
    assert store.clean(tmp_path, most=500) == [old.name]
    assert young.exists()
