import pytest

from experiments import compile_cpu
from experiments.compile_cpu import Config
from kvjax.decode import BUCKETS
from tests.tiny_model import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_lengths_cost_no_more_programs_than_buckets(tiny):
    (row,) = compile_cpu.run(Config(tiny, rounds=0, lengths=BUCKETS[2], layers=1), lambda doing, done: None)
    assert 3 <= row["value"] <= len(BUCKETS)
    assert row["work"] == "programs compiled for 64 prompt lengths"
    assert row["asked"] == "at most 6, the number of buckets"


def test_starts_are_timed_by_pairs(monkeypatch):
    times = iter([10.0, 4.0, 12.0, 3.0, 9.0, 5.0])
    monkeypatch.setattr(compile_cpu, "first_token", lambda config, folder: next(times))
    rows = compile_cpu.run(Config(rounds=3, lengths=0), lambda doing, done: None)
    assert [row["value"] for row in rows] == [10.0, 4.0, 2.5]
    assert rows[0]["range"] == [9.0, 12.0] and rows[1]["range"] == [3.0, 5.0]


def test_a_start_finds_what_the_one_before_left(tiny, tmp_path):
    compile_cpu.first_token(Config(tiny, prompt="Hi"), tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made
    compile_cpu.first_token(Config(tiny, prompt="Hi"), tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")} <= made


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="wrote nothing; it said: kvjax: .*does not exist"):
        compile_cpu.first_token(Config("/nowhere.gguf"), tmp_path)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="`layers` must be at least 1, got 0"):
        Config(layers=0)
