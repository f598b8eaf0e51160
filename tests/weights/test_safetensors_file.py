"""Safetensors and JSON that are cut short or corrupt."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kvjax.weights.safetensors_file import read_folder, read_json, read_safetensors


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("st") / "small.safetensors"
    save_file({"x": np.arange(12, dtype=np.float32).reshape(3, 4), "mask": np.ones(3, bool)}, path)
    return path


def test_only_floating_tensors_are_read(small):
    tensors = read_safetensors(small)
    assert set(tensors) == {"x"}
    np.testing.assert_array_equal(tensors["x"].read(), np.arange(12).reshape(3, 4))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 1, exclude_max=True), at=st.integers(0, 200), value=st.integers(0, 255), cut=st.booleans())
def test_a_spoilt_file_is_a_value_error(keep, at, value, cut, small, tmp_path):
    content = bytearray(small.read_bytes())
    if cut:
        content = content[: int(keep * len(content))]
    else:
        content[at % len(content)] = value
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    try:
        for tensor in read_safetensors(bad).values():
            tensor.read()
        assert not cut
    except ValueError as error:
        assert "bad.safetensors" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"a": "\ud800"}'.encode("utf-8", "surrogatepass"), b"\xff"])
def test_bad_json_names_the_file(text, tmp_path):
    content = text.encode() if isinstance(text, str) else text
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_json(tmp_path / "config.json")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file"):
        read_folder(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match=r"index\.json: `weight_map`"):
        read_folder(tmp_path)
