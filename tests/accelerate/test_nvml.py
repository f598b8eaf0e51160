"""What NVML says, by a driver that is made up; without one there is a sentence."""

import sys
from types import SimpleNamespace

import jax

from kvjax.accelerate.nvml import Gpu, Memory, gpus, memory


class Trouble(Exception):
    """As `pynvml.NVMLError`."""


class Driver(SimpleNamespace):
    """As the module `pynvml`, of one GPU that has no thermometer."""

    NVMLError = Trouble
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, count=1):
        super().__init__(open=0, count=count)

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=3, total=10)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97, memory=50)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle, which):
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetTemperature(self, handle, which):
        raise Trouble("not supported")


def test_figures_in_units_of_one(monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    found = gpus()
    assert found.missing is None and driver.open == 0
    (gpu,) = found.gpus
    assert gpu == Gpu("NVIDIA H200", 3, 10, 0.97, 0.5, 650.0, 700.0, 1.98e9, 3.201e9, None)


def test_no_package_no_driver_and_no_gpu_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus().gpus == () and "pip install -e '.[gpu]'" in gpus().missing
    monkeypatch.setitem(sys.modules, "pynvml", Driver(count=0))
    assert "knows of no GPU" in gpus().missing
    silent, lost = Driver(), Driver()

    def fail(*args):
        raise Trouble("Driver Not Loaded")

    silent.nvmlInit = lost.nvmlDeviceGetMemoryInfo = fail
    for driver in (silent, lost):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        assert gpus().gpus == () and "Driver Not Loaded" in gpus().missing
        assert driver.open == 0


def test_jax_counts_its_own_memory(unchecked):
    assert memory(jax.devices("cpu")[0]) is None
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 20}
    assert memory(SimpleNamespace(memory_stats=lambda: stats)) == Memory(5, 9, 20)
    assert memory(SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5})) == Memory(5, 5, None)
