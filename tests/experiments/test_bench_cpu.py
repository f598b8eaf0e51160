import sys

import numpy as np
import pytest

import kvjax
from experiments import bench_cpu
from experiments.peers import client, serve
from experiments.peers.convert import converted
from experiments.peers.ours import make
from experiments.peers.work import Timing, Work, shape
from tests.tiny_model import save_tiny


class Fake:
    """An engine whose speed is in its name; it notes who computes when."""

    log: list[tuple[str, str]] = []

    def __init__(self, python, kind, options):
        self.name = f"{kind}{' stream' if options.get('stream') else ''}"
        self.turn = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def tokens(self, text):
        return list(text.encode())

    def measure(self, work):
        self.log.append((self.name, work.name))
        self.turn += 1
        pace = {"kvjax": 1.0, "kvjax stream": 2.0, "llama.cpp": 4.0}[self.name]
        seconds = pace * (100 if self.turn == 1 else self.turn)  # the first turn warms up
        tokens = [1] * (work.new + 1)
        return Timing(seconds, tokens[:2] + [2] * (work.new - 1) if self.name == "llama.cpp" else tokens, "tuned")


def test_engines_take_turns_and_the_median_counts(monkeypatch, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"")
    monkeypatch.setattr(bench_cpu, "Client", Fake)
    monkeypatch.setattr(bench_cpu, "lacking", lambda python, needs: "pip install torch" if "torch" in needs else None)
    Fake.log.clear()
    config = bench_cpu.Config(
        str(model),
        ("kvjax stream", "llama.cpp Q4_1", "transformers static"),
        ("decode-1-128", "prefill-16"),
        new=8,
        rounds=3,
    )
    rows = bench_cpu.run(config, lambda doing, done: None)
    first = [name for name, work in Fake.log if work == "decode-1-128"]
    assert first == ["kvjax", "kvjax stream", "llama.cpp"] * 4
    assert {name for name, work in Fake.log if work == "prefill-16"} == {"kvjax", "llama.cpp"}
    ours, stream, llama = rows[:3]
    assert ours == {
        "engine": "kvjax",
        "work": "decode-1-128",
        "tokens_per_s": 8 / 3,
        "range": [8 / 4, 8 / 2],
        "ratio": 1.0,
        "agree": "9/9",
        "note": "tuned",
    }
    assert stream["ratio"] == 0.5 and llama["ratio"] == 0.25 and llama["agree"] == "2/9"
    assert rows[-1] == {"engine": "transformers static", "note": "not installed: pip install torch"}


@pytest.mark.parametrize("name", ["decode-1", "prefill-1-2", "decode-x-2", "decode-0-2", "sing-1-2"])
def test_wrong_works_are_refused(name):
    with pytest.raises(ValueError, match="expected decode-BATCH-CONTEXT or prefill-CONTEXT"):
        bench_cpu.Config(works=(name,))


def test_wrong_engines_rounds_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`engines` must be among kvjax"):
        bench_cpu.Config(engines=("vllm",))
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        bench_cpu.Config(rounds=0)
    with pytest.raises(ValueError, match="must be 'smollm2' or a .gguf file"):
        bench_cpu.run(bench_cpu.Config(model=str(tmp_path)), lambda doing, done: None)


def test_shape_and_counted_tokens():
    assert shape("decode-8-128") == (8, 128, 1) and shape("prefill-512") == (1, 512, 0)
    assert Work("decode-2-3", [[1] * 3] * 2, 5).counted == 10 and Work("prefill-3", [[1] * 3], 0).counted == 3


def test_lacking_names_the_line(monkeypatch):
    assert bench_cpu.lacking("", ("numpy",)) is None
    assert bench_cpu.lacking("", ("numpy", "no-such-peer")) == f"{sys.executable} -m pip install no-such-peer"
    with pytest.raises(ValueError, match="`peer_python` must be a Python interpreter"):
        bench_cpu.lacking("/nowhere/python", ("numpy",))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_ours_decodes_what_generate_decodes(tiny):
    work = Work("decode-2-7", [list(range(7)), list(range(3, 10))], 6)
    timing = make(tiny, 2).measure(work)
    model, params, _ = kvjax.load(tiny)
    cache = kvjax.cache.Dense().init(model, batch=2, capacity=14)
    out = kvjax.generate(model, params, cache, work.prompts, max_new=7)
    assert timing.tokens == out.tokens[0].tolist() and timing.seconds > 0
    assert make(tiny, 2, stream=True).measure(work).tokens == timing.tokens
    assert make(tiny, 2).measure(Work("prefill-7", work.prompts[:1], 0)).tokens == timing.tokens[:1]


def test_a_served_engine_answers_and_a_dead_one_says_why(tiny):
    with client.Client("", "kvjax", {"model": tiny, "threads": 1}) as engine:
        assert engine.tokens("ab") == [97, 98]
        assert len(engine.measure(Work("decode-1-4", [[1, 2, 3, 4]], 3)).tokens) == 4
        with pytest.raises(RuntimeError, match="kvjax ended with code 1; the end of what it said: .*`tokens` must be"):
            engine.measure(Work("decode-1-1", [[999]], 3))


def test_every_engine_has_a_module():
    assert {kind.serves for kind in bench_cpu.ENGINES.values()} == set(serve.ENGINES)


def test_converted_weights_are_the_same_numbers(tmp_path, monkeypatch):
    import gguf

    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quantize(values, kind)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    wide = gguf.GGUFReader(converted(source, "F32"))
    weights = {tensor.name: tensor for tensor in wide.tensors}
    np.testing.assert_array_equal(weights["blk.0.attn_q.weight"].data, gguf.dequantize(packed, kind))
    np.testing.assert_array_equal(weights["output_norm.weight"].data, values[0])
    assert wide.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert wide.fields["llama.rope.freq_base"].contents() == 10000.0
    assert wide.fields["general.architecture"].contents() == "llama"
    eight = {tensor.name: tensor for tensor in gguf.GGUFReader(converted(source, "Q8_0")).tensors}
    assert eight["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert eight["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    made = converted(source, "F32").stat().st_mtime_ns
    assert converted(source, "F32").stat().st_mtime_ns == made
    assert sorted(path.suffix for path in (tmp_path / "cache" / "bench").iterdir()) == [".gguf", ".gguf"]
