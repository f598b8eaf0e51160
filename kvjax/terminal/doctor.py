"""`kvjax doctor`: what is here, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from kvjax.paths import cache_dir
from kvjax.terminal.status import size
from kvjax.version import __version__

NEEDED = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "filelock": "filelock",
    "flax": "flax",
    "numpy": "numpy",
    "jaxtyping": "jaxtyping",
    "gguf": "gguf",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "orbax-checkpoint": "orbax.checkpoint",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
    "rich": "rich",
    "tyro": "tyro",
}
"""Distributions of the base install, and the module each is imported as."""

OPTIONAL = {
    "pytest": "pip install -e '.[test]'",
    "beartype": "pip install -e '.[test]'",
    "hypothesis": "pip install -e '.[test]'",
    "outlines-core": "pip install -e '.[grammar]'",
    "nvidia-ml-py": "pip install -e '.[gpu]'",
    "torch": "pip install -e '.[peers]'",
    "transformers": "pip install -e '.[peers]'",
    "llama-cpp-python": "pip install -e '.[peers]'",
}
"""Distributions that some part needs, and the line that brings them."""

RUN_BY = {
    "mosaic": "our kernels for Hopper GPUs, where many slots are seen; XLA elsewhere",
    "xla": "XLA (our kernels need an H100 or H200)",
    None: "unknown",
}
"""What runs attention, for a person."""


def run(as_json: bool, *, measure: bool = False) -> int:
    """Print the examination; 0 if the main job can run, 1 otherwise."""
    found = examine(measure=measure)
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 0 if found["ok"] else 1


def examine(*, measure: bool = False) -> dict:
    """Everything `doctor` says, as plain data.

    Args:
        measure: the device, anew, where it can be.
    """
    versions = {"kvjax": __version__, "python": platform.python_version(), **{name: version(name) for name in NEEDED}}
    missing = {name: f"pip install {name}" for name, module in NEEDED.items() if not _importable(module)}
    devices, trouble = _devices() if "jax" not in missing and "jaxlib" not in missing else ([], None)
    if trouble:
        missing["a device"] = f"JAX cannot start: {trouble}"
    kernels = _kernels(started=bool(devices))
    if kernels["shadowed_by"]:
        missing["kernels"] = (
            f"{kernels['shadowed_by']} hides kvjax's own module `kernels`: "
            "pip uninstall kernels, and install kvjax again"
        )
    elif kernels["path"] is None:
        missing["kernels"] = f"kvjax's own `kernels` cannot be imported ({kernels['error']}): install kvjax again"
    folder = cache_dir()
    return {
        "ok": not missing,
        "versions": versions,
        "optional": {name: version(name) for name in OPTIONAL},
        "devices": devices,
        "cache_folder": {"path": str(folder), "bytes": folder_bytes(folder), "writable": writable(folder)},
        "default_model": sorted(path.name for path in (folder / "models").glob("*.gguf")),
        "compile_cache": _compile_cache(),
        "kernels": kernels,
        "accelerate": _accelerate(measure) if devices and not missing else None,
        "missing": missing,
        "installs": {name: line for name, line in OPTIONAL.items() if version(name) is None},
    }


def as_text(found: dict) -> str:
    """The same for a person."""
    folder, compiled, kernels = found["cache_folder"], found["compile_cache"], found["kernels"]
    lines = ["versions"]
    lines += [f"  {name:<18}{value or 'missing'}" for name, value in found["versions"].items()]
    lines += ["optional"]
    lines += [f"  {name:<18}{value or 'not installed'}" for name, value in found["optional"].items()]
    lines += [
        "machine",
        f"  {'devices':<18}{', '.join(found['devices']) or 'none'}",
        f"  {'cache folder':<18}{folder['path']} ({size(folder['bytes'])}"
        + ("" if folder["writable"] else ", not writable")
        + ")",
        f"  {'default model':<18}{', '.join(found['default_model']) or 'not fetched yet: the first use does (93 MB)'}",
        f"  {'compiled programs':<18}{compiled['path'] or 'in memory only'}"
        + ("" if compiled["writable"] or not compiled["path"] else " (not writable: every start compiles)"),
        f"  {'kernels':<18}{kernels['version'] or 'missing'} at {kernels['path']}",
        f"  {'attention':<18}{RUN_BY[kernels['attention']]}",
    ]
    lines += [f"  {name:<18}{line}" for name, line in accelerate_lines(found["accelerate"])]
    lines += [f"missing: {name}. {line}" for name, line in found["missing"].items()]
    lines += [f"for more: {line}" for line in dict.fromkeys(found["installs"].values())]
    lines += ["the main job can run" if found["ok"] else "the main job cannot run"]
    return "\n".join(lines)


def accelerate_lines(found: dict | None) -> list[tuple[str, str]]:
    """What is known of the device, in a few lines; nothing where it was not looked at."""
    if found is None:
        return []
    lines = [("device facts", _spelled(found["facts"]))]
    if rows := sum(found["tuned"].values()):
        lines += [("tuned kernels", f"{rows} shapes, {found['tuned']['user']} of them your own")]
    else:
        lines += [("tuned kernels", "none; on a Hopper GPU: kvjax experiment gpu_tune")]
    for gpu in found["gpus"]:
        busy = "" if gpu["utilisation"] is None else f", busy {gpu['utilisation']:.0%}"
        lines += [("gpu now", f"{gpu['name']}: {size(gpu['used'])} of {size(gpu['total'])}{busy}")]
    if not found["gpus"]:
        lines += [("gpu now", found["no_gpus"])]
    return lines


def _spelled(facts: dict | None) -> str:
    if facts is None:
        return "not measured: kvjax doctor --measure"
    from kvjax.accelerate import Facts

    known = Facts(**facts)
    return (
        f"reads {known.read / 1e9:,.0f} GB/s, copies {known.copy / 1e9:,.0f} GB/s, multiplies "
        f"{known.flops['bfloat16'] / 1e12:.3g} (bfloat16) and {known.flops['float32'] / 1e12:.3g} (float32) TFLOP/s, "
        f"launches in {1e6 * known.launch:.2g} µs, calls in {1e6 * known.call:.2g} µs ({known.date[:10]})"
    )


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def writable(folder: Path) -> bool:
    """Whether a file can be made there, now or once its missing parents are made; tried, not asked."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _devices() -> tuple[list[str], str | None]:
    try:
        import jax

        return [f"{device.device_kind} ({device.platform} {device.id})" for device in jax.devices()], None
    except (RuntimeError, ImportError) as error:
        return [], str(error).splitlines()[0]


def _compile_cache() -> dict:
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if os.environ.get("KVJAX_COMPILE_CACHE") == "0" and not chosen:
        return {"path": None, "writable": False}
    path = Path(chosen) if chosen else cache_dir() / "compiled"
    return {"path": str(path), "writable": writable(path)}


def _accelerate(measure: bool) -> dict:
    """Facts of the device, how many shapes are tuned for it, and what NVIDIA's driver says."""
    import jax

    from kvjax.accelerate import facts, gpus, stored_facts, table
    from kvjax.accelerate.device import device_name
    from kvjax.accelerate.table import SHIPPED

    name, seen = device_name(jax.local_devices()[0]), gpus()
    known = facts(again=True) if measure else stored_facts()
    return {
        "facts": None if known is None else asdict(known),
        "tuned": {"user": len(table(name)), "package": len(table(name, SHIPPED))},
        "gpus": [asdict(gpu) for gpu in seen.gpus],
        "no_gpus": seen.missing,
    }


def _kernels(started: bool) -> dict:
    """Which module `kernels` this Python imports; ours has a `reference`, and says what runs attention."""
    try:
        import kernels

        path, named = str(kernels.__file__), getattr(kernels, "__version__", None)
        # not `find_spec("kernels.reference")`: an editable install's finder answers for a package that is shadowed
        ours = Path(path).with_name("reference.py").exists()
    except ImportError as error:
        return {"path": None, "version": None, "shadowed_by": None, "attention": None, "error": str(error)}
    other = version("kernels")
    attention = None
    if ours and started:
        from kernels.dispatch import hopper

        attention = "mosaic" if hopper() else "xla"
    return {
        "path": path,
        "version": named,
        "shadowed_by": None if ours else path,
        "attention": attention,
        "other_distribution": None if other is None else f"kernels {other}",
    }
