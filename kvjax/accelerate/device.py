"""What a device is, as far as it says so itself: name, memory, last cache."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import jax

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
"""Where Linux describes the caches of a processor."""

L2_CACHE_SIZE = 38
"""`CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE` of NVIDIA's driver API."""


def device_name(device: jax.Device) -> str:
    """What the device is called: a GPU's own name, or the processor's with the cores that this process may use."""
    if device.platform != "cpu":
        return device.device_kind
    return f"{cpu_model()}, {cores()} cores"


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: jax.Device) -> int | None:
    """Bytes that JAX may allocate on the device, of a CPU those of the machine; None where nobody says."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    if device.platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def cache_bytes(device: jax.Device) -> int | None:
    """Bytes of the cache before memory: a GPU's second level, a processor's last; None where nobody says."""
    if device.platform == "cpu":
        return _last_level(CACHES)
    if device.platform in ("gpu", "cuda"):
        return _level_two(device.local_hardware_id or 0)
    return None


def _last_level(folder: Path) -> int | None:
    sizes = []
    for cache in folder.glob("index*"):
        try:
            level, size = ((cache / name).read_text().strip() for name in ("level", "size"))
            sizes.append((int(level), int(size.removesuffix("K")) * 1024))
        except (OSError, ValueError):
            continue
    return max(sizes)[1] if sizes else None


def _level_two(ordinal: int) -> int | None:
    """Asked of NVIDIA's driver, for JAX does not pass it on."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, size = ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(handle), ordinal),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(size), L2_CACHE_SIZE, handle),
    )
    return size.value if not any(call() for call in calls) and size.value else None
