"""The command line in this process, and in processes of its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

from kvjax import cli

ROOT = Path(__file__).parents[2]


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's, with folders of its own and the modules of this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVJAX_", "JAX_"))}
    return kept | {"KVJAX_CACHE": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def in_process(home: Path, monkeypatch, capsys):
    """The command line in this process, where programs stay compiled: call it as `call`, without a home."""
    monkeypatch.setenv("KVJAX_CACHE", str(home))

    def call(*args: str, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = cli.main(list(args))
        return code, *capsys.readouterr()

    return call


def start(home: Path, *args: str, **env: str) -> subprocess.Popen:
    """`kvjax ARGS` in a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "kvjax", *args], env=environment(home, **env), cwd=home, **pipes)


def call(home: Path, *args: str, text: str = "", **env: str) -> tuple[int, str, str]:
    """Its exit code, and what it wrote to both outputs."""
    process = start(home, *args, **env)
    out, err = process.communicate(text.encode(), timeout=120)
    return process.returncode, out.decode(), err.decode()
