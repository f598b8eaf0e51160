"""What NVIDIA's driver says of its GPUs now, by NVML; and what JAX says of its own memory.

It needs the package `nvidia-ml-py` (`pip install -e '.[gpu]'`) and a driver; without either there is a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Gpu:
    """A GPU now, whatever processes use it. What the driver does not tell of this one is None.

    Args:
        name: its kind.
        used: bytes of memory in use.
        total: bytes of memory.
        utilisation: share of the driver's last sampling period (up to a second) in which a kernel ran, 0 to 1.
        memory_utilisation: likewise, in which memory was read or written.
        watts: drawn now.
        watts_limit: that it may draw.
        clock: of its multiprocessors, in hertz.
        memory_clock: in hertz.
        celsius: of the chip.
    """

    name: str
    used: int
    total: int
    utilisation: float | None
    memory_utilisation: float | None
    watts: float | None
    watts_limit: float | None
    clock: float | None
    memory_clock: float | None
    celsius: float | None


@dataclass(frozen=True)
class Gpus:
    """What NVML says.

    Args:
        gpus: of this machine, in the driver's order, whatever `CUDA_VISIBLE_DEVICES` says.
        missing: why there are none, and what would help; None where there are some.
    """

    gpus: tuple[Gpu, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Memory:
    """What JAX has taken of a device's memory, in bytes.

    Args:
        used: by live arrays and programs.
        peak: the most so far.
        limit: that it may take; None where it has no pool of its own.
    """

    used: int
    peak: int
    limit: int | None


def gpus() -> Gpus:
    """Ask the driver now; JAX need not run on the GPU."""
    try:
        import pynvml  # ty: ignore[import-not-found]  # of the extra `gpu`
    except ImportError:
        return Gpus(missing="nvidia-ml-py is not installed: pip install -e '.[gpu]'")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus(missing=f"NVIDIA's driver does not answer ({error})")
    try:
        count = pynvml.nvmlDeviceGetCount()
        found = tuple(_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count))
    except pynvml.NVMLError as error:
        return Gpus(missing=f"NVIDIA's driver does not answer ({error})")
    finally:
        pynvml.nvmlShutdown()
    return Gpus(found, None if found else "NVIDIA's driver knows of no GPU")


def memory(device: jax.Device | None = None) -> Memory | None:
    """JAX's own count of a device's memory, its first device's if None; None where it keeps none, as on a CPU."""
    stats = (jax.local_devices()[0] if device is None else device).memory_stats()
    if not stats:
        return None
    return Memory(
        stats["bytes_in_use"], stats.get("peak_bytes_in_use", stats["bytes_in_use"]), stats.get("bytes_limit")
    )


def _gpu(nvml: Any, handle: Any) -> Gpu:
    def asked(question: Callable[..., Any], *more: Any) -> Any:
        try:
            return question(handle, *more)
        except nvml.NVMLError:
            return None

    def scaled(value: int | None, unit: float) -> float | None:
        return None if value is None else value * unit

    name, held = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
    rates = asked(nvml.nvmlDeviceGetUtilizationRates)
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else name,
        used=int(held.used),
        total=int(held.total),
        utilisation=None if rates is None else rates.gpu / 100,
        memory_utilisation=None if rates is None else rates.memory / 100,
        watts=scaled(asked(nvml.nvmlDeviceGetPowerUsage), 1e-3),
        watts_limit=scaled(asked(nvml.nvmlDeviceGetEnforcedPowerLimit), 1e-3),
        clock=scaled(asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM), 1e6),
        memory_clock=scaled(asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM), 1e6),
        celsius=asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
    )
