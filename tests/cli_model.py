"""A tiny random model with a tokenizer, saved to a folder, and processes of the command line that use it."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import kvjax
from kvjax import cli
from kvjax.weights import Tokenizer
from kvjax.weights.tokenizer import byte_alphabet
from tests.tiny import LLAMA

ROOT = Path(__file__).parents[1]
END = 257
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and the two markers of a chat."""
    inner = Inner(BPE({char: i for i, char in enumerate(byte_alphabet())}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False, use_regex=False), Decoder()
    inner.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    marks = frozenset({256, END})
    return Tokenizer(inner, True, marks, marks, None, END, (END,), template=TEMPLATE)


def save_tiny(folder: Path, **changes) -> Path:
    """A model of 260 tokens whose text is noise, but always the same noise."""
    model = kvjax.Transformer(replace(LLAMA, vocab=260, **changes))
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, kvjax.init_params(model, jax.random.key(7)))
    kvjax.save_model(folder, (model, params, bytes_tokenizer()))
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's, with folders of its own and the modules of this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVJAX_", "JAX_"))}
    return kept | {"KVJAX_CACHE": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def in_process(home: Path, monkeypatch, capsys):
    """The command line in this process, where programs stay compiled: call it as `call`, without a home."""
    monkeypatch.setenv("KVJAX_CACHE", str(home))
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "0")

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
