"""The names a user sees; a change here is a change of the interface."""

import subprocess
import sys

import kvjax

NAMES = [
    "Acceleration",
    "Cache",
    "ModelConfig",
    "Output",
    "Precision",
    "Rope",
    "Sampling",
    "Transformer",
    "__version__",
    "batch",
    "beam",
    "best_of",
    "cache",
    "decode",
    "decode_step",
    "draft",
    "export_cache",
    "fork",
    "forward",
    "generate",
    "grammar",
    "import_cache",
    "init_params",
    "load",
    "majority",
    "nbytes",
    "param_shapes",
    "prefill",
    "restore",
    "restore_store",
    "sample_n",
    "save",
    "save_model",
    "save_store",
    "serve",
    "speculate",
    "stream",
]


def test_public_names():
    assert sorted(kvjax.__all__) == sorted(NAMES)
    assert all(hasattr(kvjax, name) for name in NAMES)


def test_importing_loads_nothing_heavy():
    """Readers and tools are imported where they are used: a start costs JAX and Flax only."""
    code = (
        "import sys, kvjax; heavy = {'gguf', 'tokenizers', 'jinja2', 'huggingface_hub', 'orbax.checkpoint', "
        "'safetensors', 'tyro', 'outlines_core', 'transformers', 'torch'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
