"""Facts of a device are measured once, and again only where what is stored cannot be used."""

import json
from dataclasses import asdict, replace
from importlib import import_module

import jax
import pytest

from kvjax.accelerate import rates
from kvjax.accelerate.facts import VERSION, facts, facts_file, measure, read_facts, stored_facts
from tests.accelerate.made_up import FACTS

module = import_module("kvjax.accelerate.facts")


@pytest.fixture
def measured(monkeypatch):
    """How often a device was measured."""
    times = []
    bandwidths = dict.fromkeys(rates.FORMS, 2.0)

    def once(device, tell):
        times.append(device)
        return replace(FACTS, bandwidths=bandwidths, call=float(len(times)))

    monkeypatch.setattr(module, "measure", once)
    return times


def test_measured_once_and_read_from_then_on(measured, tmp_path):
    assert stored_facts(folder=tmp_path) is None
    first = facts(folder=tmp_path)
    assert facts(folder=tmp_path) == first == stored_facts(folder=tmp_path) and len(measured) == 1
    assert facts(folder=tmp_path, again=True).call == 2.0 == facts(folder=tmp_path).call
    assert [path.name for path in tmp_path.iterdir()] == [facts_file(jax.devices()[0]).name]


def without(name):
    return lambda data: {key: value for key, value in data.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data | {"version": VERSION - 1}, f"must be of version {VERSION}, got {VERSION - 1}"),
        (without("launch"), "must have"),
        (lambda data: data | {"flops": {"float32": 1.0}}, "must have `flops` of bfloat16, float32, got"),
        (lambda data: data | {"bandwidths": {**data["bandwidths"], "add": 0}}, "must have positive `bandwidths`"),
        (lambda data: data | {"flops": None}, "must have `flops` of"),
        (lambda data: [data], "must be of version"),
        (None, "is no JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_measured_again_with_one_warning(measured, tmp_path, damage, said):
    facts(folder=tmp_path)
    path = facts_file(jax.devices()[0], tmp_path)
    whole = path.read_text()
    path.write_text(whole[:50] if damage is None else json.dumps(damage(json.loads(whole))))
    assert stored_facts(folder=tmp_path) is None
    with pytest.warns(UserWarning, match=said) as told:
        found = facts(folder=tmp_path)
    assert len(told) == 1 and found.call == 2.0
    assert read_facts(path) == found


def test_a_folder_that_cannot_be_written_costs_a_warning(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert facts(folder=tmp_path / "file" / "folder").call == 1.0


def test_a_device_is_measured_in_every_form(monkeypatch):
    """On this machine, with arrays that take no time."""
    monkeypatch.setitem(rates.BYTES, "cpu", 2**20)
    monkeypatch.setitem(rates.BYTES, "gpu", 2**20)
    small = dict.fromkeys(("float32", "bfloat16"), 64)
    monkeypatch.setattr(rates, "SIDE", {"cpu": small, "gpu": small})
    monkeypatch.setattr(rates, "CHAIN", (1, 4))
    told = []
    found = measure(jax.devices()[0], told.append)
    assert set(found.bandwidths) == set(rates.FORMS) and set(found.flops) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in (*found.bandwidths.values(), *found.flops.values(), found.call))
    assert found.launch >= 0 and found.jax == jax.__version__
    assert len(told) == len(rates.FORMS) + 3
    json.dumps(asdict(found), allow_nan=False)
