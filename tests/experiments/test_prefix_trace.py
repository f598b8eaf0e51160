import itertools

import numpy as np
import pytest

from experiments import prefix_prior, prefix_trace
from experiments.prefix_baselines import Belady, Lfu, S3Fifo
from experiments.prefix_trace import DATA, Config, read
from kvjax.cache.prefix import POLICIES, Access, Lru, replay
from kvjax.cache.prefix.beliefs import beliefs
from tests.cache.prefix.traces import chat

TRACES = ("mooncake_conv_first_half.npz", "mooncake_synth_first_half.npz")


def save(path, accesses):
    blocks = [block for access in accesses for block in access.path]
    np.savez(
        path,
        arrival_ms=[int(1000 * access.time) for access in accesses],
        input_length=[access.tokens for access in accesses],
        output_length=[access.answer for access in accesses],
        block_ids_delta=np.diff(blocks, prepend=0),
        offsets=np.cumsum([0, *(len(access.path) for access in accesses)]),
        block_size=512,
    )
    return str(path)


def silent(doing, done):
    return None


def test_rows_lie_between_lru_and_the_optimum(tmp_path):
    accesses = chat(3, 300)
    config = Config(save(tmp_path / "t.npz", accesses), (80,), (0.2,), ("predictive", "lfu", "belady"), skip=0.5)
    infinite, *rows = prefix_trace.run(config, silent)
    rest = accesses[150:]
    distinct = len({block for access in rest for block in access.path})
    assert infinite["policy"] == "infinite" and infinite["capacity"] == distinct
    assert [row["capacity"] for row in rows] == [80] * 4 + [round(0.2 * distinct)] * 4
    assert [row["policy"] for row in rows[:4]] == ["lru", "belady", "predictive", "lfu"]
    assert rows[0]["gap_closed"] == 0.0 and rows[1]["gap_closed"] == 1.0
    references = sum(len(access.path) for access in rest)
    for row in rows:
        assert row["hit_rate"] <= rows[1 if row["capacity"] == 80 else 5]["hit_rate"] <= infinite["hit_rate"]
        assert row["of_reusable"] == pytest.approx(row["hit_rate"] / infinite["hit_rate"])
    assert rows[0]["hit_rate"] == sum(replay(Lru(), 80, rest)) / references


def test_a_trace_reads_as_it_was_written(tmp_path):
    accesses = chat(4, 50)
    stored = read(prefix_trace.find(save(tmp_path / "t.npz", accesses)))
    assert [access.path for access in stored] == [access.path for access in accesses]
    assert [access.answer for access in stored] == [access.answer for access in accesses]
    assert stored[7].time == pytest.approx(accesses[7].time, abs=1e-3)
    assert {access.answer for access in read(tmp_path / "t.npz", answers=False)} == {None}


def arrays(**changes):
    """A trace of three prompts, the second without a block, as arrays; None leaves one out."""
    stored = {
        "arrival_ms": [0, 1500, 2500],
        "input_length": [600, 0, 1030],
        "output_length": [5, 0, 7],
        "block_ids_delta": [4, 1, 0 - 1, 1, 3],
        "offsets": [0, 2, 2, 5],
    } | changes
    return {name: np.asarray(array) for name, array in stored.items() if array is not None}


def test_prompts_come_by_arrival_and_empty_ones_are_left_out(tmp_path):
    np.savez(tmp_path / "t.npz", **arrays())
    assert [(a.path, a.time, a.tokens) for a in read(tmp_path / "t.npz")] == [
        ((4, 5), 0.0, 600),
        ((4, 5, 8), 2.5, 1030),
    ]
    np.savez(tmp_path / "t.npz", **arrays(arrival_ms=[1700.5, 3.0, 20.25]))
    assert [(a.path, a.time) for a in read(tmp_path / "t.npz")] == [((4, 5, 8), 0.02025), ((4, 5), 1.7005)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"offsets": None}, "offsets"),
        ({"offsets": [0, 2, 2]}, "2 prompts in offsets, but 3 of arrival_ms"),
        ({"offsets": [0, 2, 1, 5]}, "offsets must rise from 0 to the number of block ids"),
        ({"offsets": [0, 2, 2, 6]}, "offsets must rise from 0 to the number of block ids"),
        (
            {"block_ids_delta": [4.0, 1.0, -1.0, 1.0, 3.0]},
            r"block_ids_delta must be a row of whole numbers, got float64",
        ),
        ({"block_ids_delta": [4, 1, 0, 1, 3]}, "block 5 follows both 4 and -1"),
        ({"block_ids_delta": [4, 0, 0, 1, 3]}, "block 4 follows both -1 and 4"),
        ({"arrival_ms": [0, float("nan"), 1]}, "arrival_ms must be finite"),
        ({"input_length": [600, -1, 1030]}, "lengths must not be negative"),
        ({"offsets": [0, 0, 0, 0], "block_ids_delta": np.zeros(0, int)}, "it has no prompt with a block"),
        ({"output_length": [[5, 0, 7]]}, r"output_length must be a row of whole numbers, got int64 \(1, 3\)"),
    ],
)
def test_a_malformed_trace_is_refused_by_name(tmp_path, changes, why):
    np.savez(tmp_path / "t.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=f"`trace` must be as experiments/data/README.md says, .*t.npz: .*(?:{why})"):
        read(tmp_path / "t.npz")


def test_a_broken_file_is_refused_by_name(tmp_path):
    whole = (DATA / TRACES[1]).read_bytes()
    np.save(tmp_path / "one.npy", np.arange(3))
    for data in (whole[:5000], whole[:9000] + b"0" * 3000 + whole[12000:], (tmp_path / "one.npy").read_bytes(), b""):
        (tmp_path / "t.npz").write_bytes(data)
        with pytest.raises(ValueError, match="`trace` must be as experiments/data/README.md says"):
            read(tmp_path / "t.npz")


def test_of_a_prompt_longer_than_the_capacity_the_first_blocks_stay(tmp_path):
    accesses = chat(3, 100)
    longest = max(len(access.path) for access in accesses)
    trace = save(tmp_path / "t.npz", accesses)
    rows = prefix_trace.run(Config(trace, (3,), (), ("predictive", "workload_adaptive")), silent)
    references = sum(len(access.path) for access in accesses)
    cut = [Access(access.path[:3], access.time, access.tokens, access.answer) for access in accesses]
    assert longest > 3 and rows[1]["hit_rate"] == sum(replay(Lru(), 3, cut)) / references


@pytest.mark.parametrize("trace", TRACES)
def test_no_policy_is_half_a_point_below_lru(trace):
    accesses = read(DATA / trace)[:1000]
    references = sum(len(access.path) for access in accesses)
    for capacity in (1000, 4000):
        recent = sum(replay(Lru(), capacity, accesses))
        for name, policy in POLICIES.items():
            assert sum(replay(policy, capacity, accesses)) >= recent - 0.005 * references, (name, capacity)


def test_the_prior_is_what_its_script_fits():
    fitted, stored = prefix_prior.fit(DATA / TRACES[0]), beliefs("chat")
    for name in ("baseline", "steady", "timed"):
        np.testing.assert_allclose(getattr(fitted, name), getattr(stored, name), atol=0.00501)


@pytest.mark.parametrize("seed", range(12))
def test_belady_hits_as_often_as_any_choice_can(seed):
    rng = np.random.default_rng(seed)
    paths = [(0,), (0, 1), (0, 1, 2), (0, 3), (4,), (4, 5), (6,)]
    accesses = [Access(paths[rng.integers(len(paths))], float(i), 1) for i in range(9)]

    def best(place: int, held: frozenset[int]) -> int:
        if place == len(accesses):
            return 0
        path = accesses[place].path
        others = held - set(path)
        room = 4 - len(path)
        kept = [
            frozenset(keep)
            for size in range(min(room, len(others)), -1, -1)
            for keep in itertools.combinations(sorted(others), size)
            if size == min(room, len(others))
        ]
        closed = {0: (), 1: (0,), 2: (0, 1), 3: (0,), 4: (), 5: (4,), 6: ()}
        kept = [keep for keep in kept if all(set(closed[block]) <= keep | set(path) for block in keep)]
        return len(held & set(path)) + max(best(place + 1, keep | set(path)) for keep in kept)

    assert sum(replay(Belady.of(accesses), 4, accesses)) == best(0, frozenset())


def test_frequency_and_its_ageing():
    def at(*blocks):
        return [Access((block,), float(i), 1) for i, block in enumerate(blocks)]

    often_then_never = at(*[1] * 9, 2, 3, 2, 3, 2, 3)
    assert sum(list(replay(Lfu(), 2, often_then_never))[9:]) == 0
    assert sum(list(replay(Lfu(aging=True), 2, at(*[1] * 9, *[2, 3] * 20)))[9:]) > 0


def test_s3_fifo_keeps_what_was_hit_in_the_small_queue():
    trace = [Access((block,), float(i), 1) for i, block in enumerate([1, 1, 1, *range(10, 40), 1])]
    assert list(replay(S3Fifo(), 20, trace))[-1] == 1
    assert list(replay(Lru(), 20, trace))[-1] == 0


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`policies` must be among lru, .*got \\['fifo'\\]"):
        Config(policies=("fifo",))
    with pytest.raises(ValueError, match="`capacities` must be at least 1, got \\[0\\]"):
        Config(capacities=(0,))
    with pytest.raises(ValueError, match="`shares` must be above 0"):
        Config(shares=(1.5,))
    with pytest.raises(ValueError, match="`skip` must be at least 0 and below 1, got 1.0"):
        Config(skip=1.0)
    with pytest.raises(ValueError, match="`trace` must be an .npz file, or one of mooncake_conv"):
        prefix_trace.run(Config(trace="nowhere.npz"), silent)
    (tmp_path / "t.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="`trace` must be as experiments/data/README.md says"):
        prefix_trace.run(Config(trace=str(tmp_path / "t.npz")), silent)
