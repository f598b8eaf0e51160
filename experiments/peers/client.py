"""The other end of `serve`: an engine in a process of its own, asked from here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict

from experiments.peers.work import ROOT, Options, Timing, Work

_START = "import sys; sys.path.append(sys.argv[1]); from experiments.peers.serve import main; main(*sys.argv[2:])"
"""The folder goes last, so that the interpreter's own packages win over what lies beside ours."""


class Client:
    """A running engine; use it in a `with`, which ends it."""

    def __init__(self, python: str, kind: str, options: Options):
        self.name = kind
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed on exit, as the process is
        command = [python or sys.executable, "-c", _START, str(ROOT), kind, json.dumps(options)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __enter__(self) -> Client:
        self._reply()
        return self

    def __exit__(self, *_) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def measure(self, work: Work) -> Timing:
        """Have the work done once."""
        return Timing(**self._ask({"work": asdict(work)}))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, where the engine has a tokenizer."""
        return self._ask({"text": text})

    def _ask(self, request: dict):
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the reply says why
        return self._reply()

    def _reply(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = " ".join(self._log.read().split())[-500:]
            code = self._process.returncode
            raise RuntimeError(f"{self.name} ended with code {code}; the end of what it said: {said}")
        return json.loads(line)


def installed(python: str, distributions: tuple[str, ...]) -> dict[str, str | None]:
    """Versions of distributions as another interpreter sees them; None for those it lacks."""
    script = (
        "import json, sys\nfrom importlib import metadata\n"
        "def version(name):\n try: return metadata.version(name)\n except metadata.PackageNotFoundError: return None\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    try:
        command = [python or sys.executable, "-c", script, *distributions]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"bench_cpu: `peer_python` must be a Python interpreter, got {python!r}: {error}") from error
    return json.loads(run.stdout)
