"""Where a result was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, object]:
    """Date, commit, versions and machine; a commit that cannot be told is None. Other results make nothing dirty."""
    import jax

    from kvjax.accelerate.device import cores, cpu_model

    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results")),
        "python": platform.python_version(),
        "kvjax": metadata_version("kvjax"),
        "jax": metadata_version("jax"),
        "jaxlib": metadata_version("jaxlib"),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": cpu_model(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "cores": cores(),
    }


def metadata_version(name: str) -> str | None:
    """An installed distribution's version; kvjax's own also when it runs from its folder."""
    if name == "kvjax":
        from kvjax.version import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """What git says about the folder that holds this package; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        run = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
