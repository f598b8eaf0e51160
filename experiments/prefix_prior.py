"""Fit what the prefix store's policies believe of chat before they have seen any: writes `chat_prior.json`.

Only the first half of the conversation trace in `experiments/data/` is used, so that the other half is held out.
"""

from __future__ import annotations

import json
from pathlib import Path

import kvjax.cache.prefix
from experiments.prefix_trace import DATA, read
from kvjax.cache.prefix.beliefs import Beliefs
from kvjax.cache.prefix.predictive import Predictive
from kvjax.cache.prefix.reuse import refit

TARGET = Path(kvjax.cache.prefix.__file__).with_name("chat_prior.json")


def fit(trace: Path, share: float = 0.5) -> Beliefs:
    """The model after the first `share` of a trace, from no prior, fitted until it stays."""
    policy = Predictive(prior="none", remembered=1_000_000)
    accesses = read(trace)
    accesses = accesses[: int(share * len(accesses))]
    state = policy.init(1)
    for access in accesses:
        state = policy.touch(state, access)
    state.reuse.fitted = 0
    refit(state.reuse, accesses[-1].time, sweeps=50)
    return state.reuse.model


def main() -> None:
    model = fit(DATA / "mooncake_conv_first_half.npz")
    lines = [
        f' "{name}": {json.dumps(getattr(model, name).round(2).tolist())}' for name in ("baseline", "steady", "timed")
    ]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
