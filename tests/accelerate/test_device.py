"""What a device says of itself."""

import ctypes
from types import SimpleNamespace

import jax
import pytest

from kernels import tuned
from kvjax.accelerate import device as module
from kvjax.accelerate.device import cache_bytes, cores, device_name, memory_bytes
from kvjax.accelerate.facts import facts_file

pytestmark = pytest.mark.usefixtures("unchecked")  # devices are made up here

GPU = SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", local_hardware_id=3, memory_stats=lambda: {"bytes_limit": 7}
)


def test_names():
    assert device_name(GPU) == "NVIDIA H200" and tuned.file_name("NVIDIA H200") == "nvidia_h200.json"
    cpu = jax.devices("cpu")[0]
    assert device_name(cpu).endswith(f", {cores()} cores")
    assert tuned.file_name("AMD EPYC 9B14, 2 cores") == "amd_epyc_9b14_2_cores.json"
    assert tuned.file_name("x (y)") == "x_y.json"
    for device in (GPU, cpu):
        assert facts_file(device).name == tuned.file_name(device_name(device))


def test_memory_is_what_jax_may_allocate_or_the_machines():
    assert memory_bytes(GPU) == 7
    assert memory_bytes(SimpleNamespace(platform="gpu", memory_stats=lambda: None)) is None
    assert memory_bytes(SimpleNamespace(platform="cpu", memory_stats=lambda: None)) > 2**28


def test_the_last_level_of_a_processor(tmp_path, monkeypatch):
    for index, (level, size) in enumerate([("1", "32K"), ("3", "512K"), ("2", "1024K"), ("9", "odd")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    monkeypatch.setattr(module, "CACHES", tmp_path)
    cpu = SimpleNamespace(platform="cpu")
    assert cache_bytes(cpu) == 512 * 1024
    monkeypatch.setattr(module, "CACHES", tmp_path / "none")
    assert cache_bytes(cpu) is None
    assert cache_bytes(SimpleNamespace(platform="tpu")) is None


@pytest.mark.parametrize(("trouble", "found"), [(0, 52_428_800), (100, None)])
def test_the_second_level_of_a_gpu_is_asked_of_its_driver(monkeypatch, trouble, found):
    asked = []

    def attribute(size, number, handle):
        asked.append((number, handle.value))
        size._obj.value = 52_428_800
        return trouble

    def get(handle, ordinal):
        handle._obj.value = 10 + ordinal
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGet=get, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert cache_bytes(GPU) == found and asked == [(38, 13)]


def test_no_driver_is_no_trouble(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cache_bytes(GPU) is None
