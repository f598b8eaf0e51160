"""The GGUF reader: every tensor type, and files that are cut short or corrupt."""

import re

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.weights.gguf_file import SUPPORTED, read_gguf
from kvjax.weights.tensors import PIECE

BITS = {"F32": 32, "F16": 11, "BF16": 8, "Q8_0": 7, "Q4_0": 3, "Q4_1": 4}  # of precision, for the error's bound


def write(path, tensors, **entries):
    out = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        out.add_array(name, value) if isinstance(value, list) else out.add_key_value(name, *value)
    for name, (data, kind) in tensors.items():
        out.add_tensor(name, data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (300, 1024)], ids=str)
def test_simple_types(name, shape, tmp_path):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kind = Kind[name]
    path = write(tmp_path / "a.gguf", {"x": (gguf.quantize(values, kind), kind)})
    tensor = read_gguf(path).tensors["x"]
    assert tensor.shape == shape
    assert np.abs(tensor.read() - values).max() <= np.abs(values).max() * 2.0 ** -BITS[name]


def test_bfloat16_is_exact(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"x": (gguf.quantize(values, Kind.BF16), Kind.BF16)})
    np.testing.assert_array_equal(read_gguf(path).tensors["x"].read(), values)


def q4_k(block):
    """256 values of one 144-byte block. Source: `dequantize_row_q4_K` of ggml-quants.c, scalar by scalar."""
    d, low = np.frombuffer(block[:4], "<f2").astype(np.float32)
    scales, packed = block[4:16], block[16:]
    out = []
    for group in range(8):
        if group < 4:
            scale, least = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = (scales[group + 4] & 15) | (scales[group - 4] >> 6) << 4
            least = (scales[group + 4] >> 4) | (scales[group] >> 6) << 4
        for i in range(32):
            byte = packed[32 * (group // 2) + i]
            out.append(d * scale * (byte & 15 if group % 2 == 0 else byte >> 4) - low * least)
    return out


def q6_k(block):
    """256 values of one 210-byte block. Source: `dequantize_row_q6_K` of ggml-quants.c, scalar by scalar."""
    low, high = block[:128], block[128:192]
    scales, d = np.frombuffer(block[192:208], "i1").astype(int), np.frombuffer(block[208:], "<f2")[0]
    out = np.zeros(256, np.float32)
    for half in range(2):
        for i in range(32):
            lo, hi = low[64 * half :], high[32 * half :]
            quads = (
                (lo[i] & 15) | (hi[i] & 3) << 4,
                (lo[i + 32] & 15) | (hi[i] >> 2 & 3) << 4,
                (lo[i] >> 4) | (hi[i] >> 4 & 3) << 4,
                (lo[i + 32] >> 4) | (hi[i] >> 6) << 4,
            )
            for j, value in enumerate(quads):
                out[128 * half + 32 * j + i] = np.float32(d) * scales[8 * half + 2 * j + i // 16] * (value - 32)
    return out


@pytest.mark.parametrize(("kind", "size", "reference"), [(Kind.Q4_K, 144, q4_k), (Kind.Q6_K, 210, q6_k)])
def test_k_types_against_the_scalar_code(kind, size, reference, tmp_path):
    raw = np.random.default_rng(1).integers(0, 256, (3, 2, size), np.uint8)
    for at in (0, 2) if kind == Kind.Q4_K else (208,):
        raw[..., at : at + 2] = np.array([0.013], np.float16).view(np.uint8)
    path = write(tmp_path / "a.gguf", {"x": (raw.reshape(3, -1), kind)})
    expected = [[value for block in row for value in reference(block.tobytes())] for row in raw]
    np.testing.assert_allclose(read_gguf(path).tensors["x"].read(), expected, rtol=1e-6, atol=1e-6)


def test_pieces_are_small_and_in_order(tmp_path):
    values = np.arange(1000 * 640, dtype=np.float32).reshape(1000, 640)
    tensor = read_gguf(write(tmp_path / "a.gguf", {"x": (values, Kind.F32)})).tensors["x"]
    pieces = list(tensor.pieces())
    assert [start for start, _ in pieces] == list(np.cumsum([0] + [len(rows) for _, rows in pieces])[:-1])
    assert max(rows.size for _, rows in pieces) <= PIECE
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), values)


def test_metadata_of_every_type(tmp_path):
    kinds = gguf.GGUFValueType
    entries = {"a": (7, kinds.UINT8), "b": (-5, kinds.INT64), "c": (0.5, kinds.FLOAT64), "d": (True, kinds.BOOL)}
    entries |= {"e": ("Ünï", kinds.STRING), "f": ["x", "", "日"], "g": [1, -2, 3]}
    found = read_gguf(write(tmp_path / "a.gguf", {}, **entries)).metadata
    assert {k: found[k] for k in "abcdef"} == {"a": 7, "b": -5, "c": 0.5, "d": True, "e": "Ünï", "f": ["x", "", "日"]}
    assert found["g"].tolist() == [1, -2, 3]


def test_other_types_are_refused(tmp_path):
    path = write(tmp_path / "a.gguf", {"x": (np.zeros((1, 84), np.uint8), Kind.Q2_K)})
    with pytest.raises(ValueError, match=rf"'x' has type Q2_K; types read are {', '.join(SUPPORTED)}"):
        read_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4" + bytes(40), b"GGUF\0\0\0\3" + bytes(40)])
def test_what_is_no_gguf_is_said(content, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.gguf"))):
        read_gguf(tmp_path / "a.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    values = np.ones((4, 32), np.float32)
    tensors = {"x": (values, Kind.F32), "y": (gguf.quantize(values, Kind.Q8_0), Kind.Q8_0)}
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write(path, tensors, words=["a", "bc"], numbers=[1, 2, 3])


def read_all(path):
    for tensor in read_gguf(path).tensors.values():
        tensor.read()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_a_value_error(keep, small, tmp_path):
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(keep * (len(content) - 31))])  # the last 31 bytes may be padding
    with pytest.raises(ValueError, match=r"cut\.gguf: "):
        read_all(cut)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 500), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_a_value_error(at, value, small, tmp_path):
    content = bytearray(small.read_bytes())
    content[at % len(content)] = value
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    with np.errstate(all="ignore"):
        try:
            read_all(bad)
        except ValueError as error:
            assert "bad.gguf" in str(error)
