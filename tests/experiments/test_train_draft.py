import numpy as np
import pytest

import kvjax
from experiments import draft_prompts, train_draft
from kvjax.draft import load_draft
from tests.tiny_model import save_tiny


def test_unseen_subjects_are_in_no_training_prompt():
    every = draft_prompts.training(len(draft_prompts.ASKS) * len(draft_prompts.SUBJECTS))
    assert len(set(every)) == len(every) and draft_prompts.training(5) == every[:5]
    assert not any(subject in prompt for subject in draft_prompts.UNSEEN for prompt in every)
    assert len(set(draft_prompts.unseen(16))) == 16
    with pytest.raises(ValueError, match="`rows` must be at most"):
        draft_prompts.training(len(every) + 1)


@pytest.mark.parametrize("kind", ["heads", "early-exit"])
def test_a_draft_is_trained_kept_and_timed(kind, tmp_path, capsys):
    settings = {"rows": 4, "new": 12, "batch": 2, "epochs": 2, "lot": 2, "unseen": 2, "turns": 1, "ids": 200, "k": 3}
    model = save_tiny(tmp_path / "model")
    config = train_draft.Config(str(model), str(tmp_path / "out"), kind, layers=1, **settings)
    rows = train_draft.run(config, lambda doing, done: None)
    assert [row["method"] for row in rows] == ["generate", kind]
    assert rows[1]["differing"] == 0 and 0 <= rows[1]["accepted"] <= 3
    assert rows[1]["expected"] == pytest.approx(sum(rows[1]["shares"]))
    kept = tmp_path / "out" / "draft"
    loaded = kvjax.load(model)
    first = load_draft(kept, *loaded[:2])
    assert "update 4 of 4" in capsys.readouterr().err

    train_draft.run(config, lambda doing, done: None)
    assert "going on from update 4 of 4" in capsys.readouterr().err
    again = load_draft(kept, *loaded[:2])
    np.testing.assert_array_equal(first.trained["head"], again.trained["head"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
        ({"rows": 9, "lot": 2}, "`rows` must be a multiple of `lot`, 2, got 9"),
        ({"rate": 0.0}, "`rate` must be above 0"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        train_draft.Config(**change)
