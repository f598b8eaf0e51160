"""The quality experiment on a model of noise: what must come out whatever the model."""

import numpy as np
import pytest

import kvjax
from experiments import cache_quality, passkey
from experiments.cache_quality import Config
from experiments.quality_plot import draw
from experiments.quality_programs import Programs, resized
from kvjax.cache import Dense, Evicting
from tests.tiny import tiny
from tests.tiny_model import bytes_tokenizer, save_tiny

ALL, SOME = "evicting:budget=1.0,sinks=1,recent=2", "evicting:budget=0.3,sinks=1,recent=2"


def quiet(doing: str, done: float) -> None:
    assert 0 <= done <= 1


def test_a_cache_that_keeps_all_agrees_and_one_that_forgets_does_not(tmp_path):
    config = Config(
        str(save_tiny(tmp_path / "tiny")), (ALL, SOME), texts=3, context=16, scored=8, step=4, prompts=0, batch=2
    )
    dense, everything, some = cache_quality.run(config, quiet)
    assert [row["strategy"] for row in (dense, everything, some)] == ["dense", ALL, SOME]
    assert dense["top1"] == 1 and dense["kl"] == 0 and dense["ppl_change"] == 0
    assert everything["top1"] == 1 and abs(everything["kl"]) < 1e-5 and abs(everything["ppl_change"]) < 1e-5
    assert some["kl"] > 1e-3 and some["top1"] < 1
    assert dense["bytes_share"] == pytest.approx(dense["bytes_per_token"] / (2 * 2 * 2 * 2 * 8))
    assert some["bytes_per_token"] < 0.4 * everything["bytes_per_token"]


def test_allocated_bits_stay_within_their_share(tmp_path):
    shares = (0.5, 0.65)
    config = Config(str(save_tiny(tmp_path / "tiny")), (), shares, texts=2, context=128, scored=8, step=4, prompts=0)
    _, less, more = cache_quality.run(config, quiet)
    assert less["bytes_share"] <= 0.5 < more["bytes_share"] <= 0.65
    assert less["kl"] > more["kl"]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_stands_at_its_depth(depth):
    tokenizer = bytes_tokenizer()
    filler = tokenizer.encode("plain text " * 100)
    prompt = passkey.pass_key(tokenizer, filler, 400, depth, seed=3)
    context, key = tokenizer.decode(prompt.context), tokenizer.decode(prompt.answer)
    assert len(prompt.context) == 400 and len(prompt.answer) == passkey.DIGITS
    assert context.startswith(passkey.HEAD) and context.count(key) == 2
    head, needle = len(passkey.HEAD), len(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    assert context.index("\nThe pass key") == head + round(depth * (400 - head - needle))
    assert passkey.pass_key(tokenizer, filler, 400, depth, seed=4).answer != prompt.answer


def test_a_context_too_short_for_its_key_is_refused():
    tokenizer = bytes_tokenizer()
    with pytest.raises(ValueError, match="`length` must be over"):
        passkey.pass_key(tokenizer, passkey.text(tokenizer), 50, 0.5, seed=0)


@pytest.mark.parametrize("wrong", [None, 0, 4])
def test_a_key_is_found_if_every_digit_is(monkeypatch, tmp_path, wrong):
    """With programs that know what comes next, but for one digit; prompts of both lengths share one shape."""
    model, params, tokenizer = kvjax.load(str(save_tiny(tmp_path / "tiny")))
    config = Config(texts=0, prompts=3, lengths=(200, 220), batch=2)
    prompts = cache_quality.pass_keys(config, tokenizer, passkey.text(tokenizer))
    assert [len(p.context) for p in prompts] == [200, 220, 200]
    taken = []

    def oracle(params, cache, before, lengths, after, rest):
        best = np.roll(after, -1, axis=1)
        for row, end in enumerate(rest):
            taken.append((lengths[row], before.shape, bytes_tokenizer().decode(after[row, :end].tolist())))
            if wrong is not None:
                best[row, end - 1 - passkey.DIGITS + wrong] += 1
        return best

    monkeypatch.setattr(Programs, "_compile_key", lambda self, strategy: oracle)
    programs = Programs(model, params, [Dense()], np.zeros((0, 9), np.int32), prompts, config)
    for seen in (False, True):
        assert programs.retrieved(Dense(), seen).tolist() == [wrong is None] * 3
        more = len(passkey.QUESTION) * seen
        assert {length for length, _, _ in taken} == {200 + more, 220 + more}
        assert {shape for _, shape, _ in taken} == {(2, 220 + len(passkey.QUESTION))}
        assert all(text.startswith(passkey.START if seen else passkey.QUESTION) for _, _, text in taken)
        taken.clear()


def test_a_share_is_one_of_the_prompts_own_length():
    model, _ = tiny()
    strategy = Evicting(0.5, sinks=1, recent=2)
    cache = resized(strategy.init(model, batch=2, capacity=40), strategy, model, 20)
    assert cache.layers[0].positions.shape[1] == 20
    assert cache.layers[0].knobs.budget.tolist() == [10, 10]
    assert resized(dense := Dense().init(model, batch=1, capacity=8), Dense(), model, 4) is dense


def test_points_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plots`")
    rows = [{"strategy": name, "bytes_share": 0.5, "top1": 0.9} for name in ("dense", "evicting:budget=0.5")]
    draw(rows, tmp_path / "new" / "points.png")
    assert (tmp_path / "new" / "points.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"texts": -1}, "`texts` must be at least 0, got -1"),
        ({"step": 24}, "`step` must divide `scored`, 256, got 24"),
        ({"allocated": (0.5, 2.0)}, r"`allocated` must be shares in \(0, 1\], got \(0\.5, 2\.0\)"),
        ({"allocated": (-1.0,)}, r"`allocated` must be shares in \(0, 1\], got \(-1\.0,\)"),
        ({"strategies": ("evicting:budgt=3",)}, "evicting has the settings budget"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)
