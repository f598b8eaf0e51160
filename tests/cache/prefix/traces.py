"""Made-up conversations under a shared system prompt, for the policies' tests."""

import numpy as np

from kvjax.cache.prefix import Access

SYSTEM = (0, 1)


def chat(seed: int, prompts: int, *, goes_on=0.5, pause=60.0, rate=1.0, sudden=0.0) -> list[Access]:
    """Conversations that begin at random, `rate` prompts a second, and go on with a chance after a pause.

    Answers of 1,000 tokens and more announce the end, shorter ones a next turn, where `goes_on` is 0.5; a share
    `sudden` of prompts repeats an earlier path's beginning with an end of its own.
    """
    rng = np.random.default_rng(seed)
    fresh = iter(range(10, 10_000_000))
    waiting: list[tuple[float, tuple[int, ...]]] = []
    made: list[tuple[int, ...]] = [SYSTEM]
    accesses = []
    time = 0.0
    while len(accesses) < prompts:
        time += rng.exponential(1 / rate)
        ready = sorted(entry for entry in waiting if entry[0] <= time)
        if ready:
            waiting.remove(ready[0])
            path = ready[0][1][:-1] if len(ready[0][1]) > 2 else ready[0][1]  # the last block was partly filled
        elif rng.random() < sudden:
            path = made[rng.integers(len(made))]
            path = path[: 1 + rng.integers(len(path))]
        else:
            path = SYSTEM
        path = (*path, *(next(fresh) for _ in range(1 + rng.integers(6))))
        stays = rng.random() < goes_on
        accesses.append(Access(path, time, 512 * len(path) - 100, int(rng.integers(1, 900)) + (0 if stays else 1000)))
        made.append(path)
        if stays:
            waiting.append((time + rng.exponential(pause), path))
    return accesses
