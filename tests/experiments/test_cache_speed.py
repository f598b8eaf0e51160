import pytest

from experiments import cache_speed
from experiments.cache_speed import Config
from tests.tiny_model import save_tiny


def test_caches_take_turns_over_the_same_tokens(tmp_path, monkeypatch):
    turns = []
    inside = cache_speed._turn

    def turn(model, params, cache, tokens):
        turns.append((cache.strategy, cache.length.tolist(), tokens.tolist()))
        taken, cache = inside(model, params, cache, tokens)
        pace = 1.0 if type(cache.strategy) is cache_speed.Dense else 3.0
        return [pace * len(turns) ** 2 for _ in taken], cache

    monkeypatch.setattr(cache_speed, "_turn", turn)
    told = []
    config = Config(str(save_tiny(tmp_path / "tiny")), ("ring:window=4",), (12,), (2,), steps=2, turns=2)
    dense, ring = cache_speed.run(config, lambda doing, done: told.append(done))
    assert [length for _, length, _ in turns] == [[n, n] for n in (12, 12, 14, 14, 16, 16)]
    assert [type(strategy).__name__ for strategy, *_ in turns] == ["Dense", "Ring"] * 3
    assert len({str(tokens) for *_, tokens in turns}) == 1
    assert dense == {  # turns 3 and 5 count, 9 and 25 s
        "strategy": "dense",
        "context": 12,
        "batch": 2,
        "ms": 17e3,
        "range": [9e3, 25e3],
        "ratio": 1.0,
        "cache_mb": dense["cache_mb"],
    }
    assert ring["ratio"] == pytest.approx(3 * (16 + 36) / (9 + 25)) and ring["range"] == [48e3, 108e3]
    assert ring["cache_mb"] < dense["cache_mb"]
    assert told == sorted(told) and told[-1] < 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"contexts": (8, 0)}, r"`contexts` must be at least 1, got \[8, 0\]"),
        ({"caches": ("dence",)}, "expected one of dense"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)
