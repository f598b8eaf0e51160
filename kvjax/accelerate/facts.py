"""What the device at hand can do, measured once and kept in the user's cache folder."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import jax

from kernels.tuned import file_name
from kvjax.accelerate.device import cache_bytes, device_name, memory_bytes
from kvjax.accelerate.rates import FORMS, bandwidth, call_seconds, launch_seconds, product_rate
from kvjax.accelerate.storage import write_json
from kvjax.paths import cache_dir

VERSION = 1
"""Of the file; another one is measured again."""

DTYPES = ("bfloat16", "float32")
"""Of the products whose rate is measured."""


@dataclass(frozen=True)
class Facts:
    """Of one device.

    Args:
        device: its name, of a CPU with the cores in use.
        platform: "cpu" or "gpu".
        jax: the version that measured it.
        date: when, in UTC.
        bandwidths: bytes a second by form, see `rates.bandwidth`.
        flops: floating-point operations a second of a large product, by dtype.
        launch: seconds that a kernel without work takes in a compiled program.
        call: seconds that a call of a compiled program without work takes from Python.
        memory: bytes that JAX may allocate; None where nobody says.
        cache: bytes of a GPU's second-level cache or a processor's last; None where nobody says.
    """

    device: str
    platform: str
    jax: str
    date: str
    bandwidths: Mapping[str, float]
    flops: Mapping[str, float]
    launch: float
    call: float
    memory: int | None = None
    cache: int | None = None

    @property
    def read(self) -> float:
        """Bytes a second that are read at best, with next to nothing written."""
        return self.bandwidths["read"]

    @property
    def copy(self) -> float:
        """Bytes a second read and written at best: of the forms that do both."""
        return max(rate for form, rate in self.bandwidths.items() if form != "read")

    @property
    def bandwidth(self) -> float:
        """Bytes a second that no form went beyond: the memory's speed."""
        return max(self.bandwidths.values())


def facts(device: jax.Device | None = None, *, folder: Path | None = None, again: bool = False) -> Facts:
    """What is known of a device, JAX's first if None: read if it is stored, else measured (seconds) and stored.

    A file that is damaged or of another version is measured again, after one warning. Measuring wants the device for
    itself. A folder that cannot be written costs a warning, and the next process measures again.

    Args:
        folder: None means `devices` in kvjax's cache folder.
        again: measure even if it is stored.
    """
    device = jax.local_devices()[0] if device is None else device
    path = facts_file(device, folder)
    if not again and path.exists():
        try:
            return read_facts(path)
        except ValueError as error:
            warnings.warn(f"facts: {error}; the device is measured again", stacklevel=2)
    found = measure(device, _tell)
    try:
        write_json(path, {"version": VERSION, **asdict(found)})
    except OSError as error:
        warnings.warn(f"facts: {path} cannot be written ({error}); set KVJAX_CACHE to a folder that can", stacklevel=2)
    return found


def stored_facts(device: jax.Device | None = None, *, folder: Path | None = None) -> Facts | None:
    """What is stored of a device, JAX's first if None; measures nothing.

    Returns:
        None if nothing is stored, or what is stored cannot be used.
    """
    try:
        return read_facts(facts_file(jax.local_devices()[0] if device is None else device, folder))
    except (OSError, ValueError):
        return None


def facts_file(device: jax.Device, folder: Path | None = None) -> Path:
    """Where what is known of a device is kept."""
    folder = cache_dir() / "devices" if folder is None else folder
    return folder / file_name(device_name(device))


def read_facts(path: Path) -> Facts:
    """What a file says.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what `facts` writes, saying what was expected.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} must be of version {VERSION}, got {version!r}")
    names = {field.name for field in fields(Facts)}
    if data.keys() != names:
        raise ValueError(f"{path} must have {sorted(names)}, got {sorted(data)}")
    rates = {"bandwidths": FORMS, "flops": DTYPES}
    for name, kinds in rates.items():
        held = data[name]
        if not isinstance(held, dict) or held.keys() != set(kinds):
            raise ValueError(f"{path} must have `{name}` of {', '.join(kinds)}, got {held}")
        if not all(isinstance(rate, (int, float)) and rate > 0 for rate in held.values()):
            raise ValueError(f"{path} must have positive `{name}`, got {held}")
    return Facts(**data)


def measure(device: jax.Device, tell: Callable[[str], None] = lambda doing: None) -> Facts:
    """Measure a device; `tell` hears what is being done."""
    with jax.default_device(device):
        forms = {}
        for form in FORMS:
            tell(f"memory, {form}")
            forms[form] = bandwidth(form, device.platform)
        flops = {}
        for dtype in DTYPES:
            tell(f"products in {dtype}")
            flops[dtype] = product_rate(device.platform, dtype)
        tell("launches")
        launch, call = launch_seconds(), call_seconds()
    return Facts(
        device=device_name(device),
        platform=device.platform,
        jax=jax.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        bandwidths=forms,
        flops=flops,
        launch=launch,
        call=call,
        memory=memory_bytes(device),
        cache=cache_bytes(device),
    )


def _tell(doing: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring this device: {doing}", file=sys.stderr, flush=True)
