import numpy as np
import pytest

import kvjax
from experiments import decode
from experiments.decode_batches import requests_of
from tests.tiny_model import save_tiny

SMALL = {"batches": (1, 2), "prompts": 2, "new": 6, "turns": 1, "requests": 3, "rows": 2, "slots": 2, "samples": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_every_way_has_a_row_and_the_tokens_of_generate(path, capsys):
    config = decode.Config(model=path, works=("open", "samples"), prompt=20, **SMALL)
    rows = decode.run(config, lambda doing, done: None)
    ways = [(row["work"], row["batch"], row["method"]) for row in rows]
    assert ways == [
        *(("open", batch, way) for batch in (1, 2) for way in ("generate", "prompt lookup")),
        ("samples", 2, "2 calls"),
        ("samples", 2, "sample_n"),
    ]
    for row in rows:
        assert {"method", "work", "tokens_per_s", "speedup", "accepted"} <= set(row) and row["tokens_per_s"] > 0
        assert row["method"] not in ("generate", "2 calls") or row["speedup"] == 1
        assert row.get("differing", 0) == 0 and 0 <= row["accepted"] <= 7
    assert rows[-1]["bytes"] < rows[-2]["bytes"]
    assert "sample_n" in capsys.readouterr().err


def test_the_trace_is_served_in_slots_and_in_static_batches_of_equal_memory(path):
    config = decode.Config(model=path, works=("trace",), divide=512, **SMALL)
    rows = decode.run(config, lambda doing, done: None)
    assert [row["method"] for row in rows] == ["static batches of 2", "static batches of 1", "continuous batching"]
    assert all(row["tokens_per_s"] > 0 and row["accepted"] == 0 for row in rows)
    assert rows[0]["speedup"] == 1 and rows[2]["bytes"] <= rows[0]["bytes"]


def test_requests_begin_alike_where_the_trace_does(path):
    tokenizer = kvjax.load(path)[2]
    config = decode.Config(model=path, requests=64, divide=32)
    made = requests_of(config, tokenizer)
    assert len({r.name for r in made}) == 64
    first = {tuple(r.tokens[: config.page]) for r in made if len(r.tokens) >= config.page}
    assert len(first) < sum(len(r.tokens) >= config.page for r in made)


def test_works_ask_about_ordinary_text(path):
    tokenizer = kvjax.load(path)[2]
    for work in decode.ASKS:
        asked = [tokenizer.decode(decode.ask(tokenizer, work, i)) for i in range(4)]
        assert len(set(asked)) == 4
    text = decode._page(0)
    assert 0 < np.sum([a != b for a, b in zip(text.split(), decode._misspelt(text).split(), strict=True)]) < 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new": 0}, "`new` must be at least 1, got 0"),
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"methods": ("lookup",)}, "`methods` must be among prompt lookup, got"),
        ({"works": ("edit", "poem")}, r"`works` must be among .*, got \['poem'\]"),
        ({"batches": (3,)}, "`batches` must be numbers that divide `prompts`, 8, got"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        decode.Config(**change)
