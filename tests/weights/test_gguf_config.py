"""GGUF metadata: rope scaling, windows, and entries that are refused."""

import gguf
import numpy as np
import pytest

import kvjax


def test_yarn(golden, write_gguf):
    path = write_gguf(
        golden / "families" / "llama_yarn",
        keys=[
            lambda out: out.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            lambda out: out.add_rope_scaling_factor(4.0),
            lambda out: out.add_rope_scaling_orig_ctx_len(16),
        ],
    )
    assert kvjax.load(path).model.config == kvjax.load(golden / "families" / "llama_yarn").model.config


def test_llama3_factors_become_the_rule_again(golden, write_gguf, llama3_divisors):
    theta, factor = 500.0, 8.0
    path = write_gguf(
        golden / "families" / "llama3_scaled",
        keys=[lambda out: out.add_rope_scaling_orig_ctx_len(16)],
        tensors={"rope_freqs.weight": llama3_divisors(theta, 16, factor, 16)},
    )
    assert kvjax.load(path).model.config == kvjax.load(golden / "families" / "llama3_scaled").model.config


def test_other_rope_factors_are_refused(golden, write_gguf):
    tensors = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"llama3_scaled\.gguf: rope_freqs\.weight holds other factors"):
        kvjax.load(write_gguf(golden / "families" / "llama3_scaled", tensors=tensors))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (lambda out: out.add_expert_count(8), "mixtures of experts"),
        (lambda out: out.add_rope_dimension_count(4), "rope on 4 of 8 dimensions"),
        (lambda out: out.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope scaling 'longrope'"),
    ],
)
def test_what_is_not_supported_is_said(golden, write_gguf, key, message):
    keys = [key, lambda out: out.add_rope_scaling_factor(2.0)]
    with pytest.raises(ValueError, match=message):
        kvjax.load(write_gguf(golden / "families" / "llama2", keys=keys))


def test_missing_entries_are_named_at_once(tmp_path):
    out = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    out.add_block_count(2)
    out.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(ValueError, match=r"a\.gguf: .*qwen2\.embedding_length, qwen2\.feed_forward_length"):
        kvjax.load(tmp_path / "a.gguf")
