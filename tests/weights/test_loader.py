"""Where a model may come from, and the real one."""

import json
import subprocess
import sys
from pathlib import Path

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors

import kvjax

WIDTH = 192
ROWS = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text(encoding="utf-8"))["rows"]
TIE = 5e-3  # of a logit: below it another order of sums may choose the other token


@pytest.mark.parametrize("source", ["nothing.gguf", "/no/such/folder", "a/b/c", ""])
def test_what_does_not_exist_names_what_is_accepted(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'smollm2' \(the default\), a \.gguf file, a Hugging Face folder"):
        kvjax.load(tmp_path / "gone" if source == "" else source)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor kvjax\.json"):
        kvjax.load(tmp_path)


def test_a_hub_id_goes_through_the_hub(golden, monkeypatch):
    asked = {}

    def download(repo, *, allow_patterns):
        asked[repo] = allow_patterns
        return str(golden / "families" / "qwen3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    chex.assert_trees_all_equal(kvjax.load("Org/tiny-qwen3").params, kvjax.load(golden / "families" / "qwen3").params)
    assert asked == {"Org/tiny-qwen3": ["*.json", "*.jinja", "model*.safetensors"]}


def test_the_hubs_own_cache_is_enough_offline(golden, tmp_path, monkeypatch):
    home = tmp_path / "models--Org--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir()
    snapshot.symlink_to(golden / "families" / "qwen3", target_is_directory=True)
    script = "import kvjax; print(kvjax.load('Org/tiny').model.config.family)"
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True,
        cwd=Path(kvjax.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.strip() == "qwen3"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.LocalEntryNotFoundError("no network"), ConnectionError, "could not be asked.*no network"),
        (errors.OfflineModeIsEnabled("offline"), ConnectionError, "connect to the internet once"),
        (errors.HFValidationError("bad id"), FileNotFoundError, "neither a local path nor a repository"),
    ],
)
def test_a_hub_that_does_not_answer_is_said(error, kind, message, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=message):
        kvjax.load("Org/name")


def test_importing_kvjax_is_light():
    heavy = ("gguf", "tokenizers", "jinja2", "huggingface_hub", "orbax", "transformers", "torch", "safetensors")
    script = f"import sys, kvjax; print([name for name in {heavy} if name in sys.modules])"
    root = Path(kvjax.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def score(smollm2):
    """Logits after each token of a list, through one compiled shape."""
    model, params, _ = smollm2
    run = jax.jit(lambda params, ids, lengths: model.apply({"params": params}, ids, lengths)[0])

    def score(ids):
        padded = jnp.asarray([ids + [0] * (WIDTH - len(ids))], jnp.int32)
        return np.asarray(run(params, padded, jnp.asarray([len(ids)], jnp.int32)))[0, : len(ids)]

    return score


@pytest.mark.real
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_default_model_chooses_the_tokens_of_transformers(row, smollm2, score):
    """Teacher-forced, so that one near tie cannot hide the steps after it."""
    assert smollm2[2].encode(row["prompt"]) == row["ids"]
    logits = score(row["ids"] + row["tokens"])[len(row["ids"]) - 1 : -1]
    clear = np.array(row["margins"]) > TIE
    np.testing.assert_array_equal(logits.argmax(-1)[clear], np.array(row["tokens"])[clear])
    best = np.sort(logits, -1)
    np.testing.assert_allclose(best[:, -1] - best[:, -2], row["margins"], atol=1e-3)
