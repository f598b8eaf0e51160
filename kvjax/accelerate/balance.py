"""Which of several devices, or groups of them, takes a request: by what it would cost there, and what is waiting.

Requests go where load and cost together are least, so that one whose prefix a device holds goes to that device unless
it is further behind the others than the prefix is worth.
Sources: Graham 1969, "Bounds on Multiprocessing Timing Anomalies", for the greedy rule; Srivatsa et al. 2024, "Preble"
(arXiv:2407.00023), for trading prefixes against load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvjax.cache.prefix import Access, Lru, Play, Policy, match, play

Cost = Callable[[int, int, int], float]
"""From a prompt's tokens, those of them that are held already, and new tokens, to any unit of time."""


@dataclass(frozen=True)
class LinearCost:
    """Time in prompt tokens: of those taken in, of new ones, and of the context that each new one reads.

    The defaults are those of an 8B model in bfloat16 on an H200 by its arithmetic and bandwidth, at 64 rows: 27 µs a
    prompt token, 80 µs a new one, and 27 ns for each token that it reads.
    """

    prompt: float = 1.0
    new: float = 3.0
    context: float = 1e-3

    def __call__(self, tokens: int, held: int, new: int) -> float:
        return self.prompt * (tokens - held) + new * (self.new + self.context * (tokens + new / 2))


@dataclass(frozen=True)
class Placed:
    """Where a request goes.

    Args:
        device: from 0.
        cost: predicted there; give it to `finish` when the request is through.
        held: tokens of the prompt that the device has.
    """

    device: int
    cost: float
    held: int


@dataclass
class Loads:
    """Predicted cost of what waits on each device, and its prefix store's game. A state that was given is used up."""

    waiting: list[float]
    stores: list[Play]


@dataclass(frozen=True)
class Balance:
    """How requests are placed.

    Args:
        devices: devices, or groups of them that share a model.
        block: tokens of a prefix block, as `Access.path` counts them.
        capacity: blocks that the prefix store of each holds.
        policy: of those stores.
        cost: what a request takes on a device.
        expected: new tokens of a request that does not say how many it will have.
        locality: what a held prefix counts beyond what it saves now, in times of that: whoever goes on from this
            request will find it there. With 0, loads alone decide.

    Raises:
        ValueError: for a number below 1, or a negative `locality`.
    """

    devices: int
    block: int
    capacity: int
    policy: Policy[Any] = Lru()
    cost: Cost = LinearCost()
    expected: int = 256
    locality: float = 1.0

    def __post_init__(self):
        for name in ("devices", "block", "capacity", "expected"):
            if getattr(self, name) < 1:
                raise ValueError(f"Balance: `{name}` must be at least 1, got {getattr(self, name)}")
        if not self.locality >= 0:
            raise ValueError(f"Balance: `locality` must be at least 0, got {self.locality}")

    def init(self) -> Loads:
        """Idle devices that hold nothing."""
        return Loads([0.0] * self.devices, [Play(self.policy, self.capacity) for _ in range(self.devices)])

    def place(self, loads: Loads, access: Access) -> tuple[Placed, Loads]:
        """Give a request that arrives to a device; of equal ones to the first.

        A prompt of more blocks than a store holds is placed by its first ones.
        """
        access = replace(access, path=access.path[: self.capacity])
        there = [self._on(device, store, access) for device, store in enumerate(loads.stores)]
        alone = self._predicted(access, 0)

        def rank(placed: Placed) -> float:
            return loads.waiting[placed.device] + placed.cost - self.locality * (alone - placed.cost)

        best = min(there, key=rank)
        play(loads.stores[best.device], access)
        loads.waiting[best.device] += best.cost
        return best, loads

    def finish(self, loads: Loads, placed: Placed) -> Loads:
        """Note that a request no longer waits."""
        loads.waiting[placed.device] -= placed.cost
        return loads

    def place_all(self, loads: Loads, accesses: Sequence[Access]) -> tuple[list[Placed], Loads]:
        """Place requests that are all there, the one that costs most first; results are in the order of `accesses`."""
        alone = [self._predicted(access, 0) for access in accesses]
        placed: dict[int, Placed] = {}
        for i in sorted(range(len(accesses)), key=lambda i: -alone[i]):
            placed[i], loads = self.place(loads, accesses[i])
        return [placed[i] for i in range(len(accesses))], loads

    def _on(self, device: int, store: Play, access: Access) -> Placed:
        held = min(match(store.held, access.path) * self.block, access.tokens - 1)
        return Placed(device, self._predicted(access, held), held)

    def _predicted(self, access: Access, held: int) -> float:
        return self.cost(access.tokens, held, self.expected if access.answer is None else access.answer)


def imbalance(loads: Iterable[float]) -> float:
    """How much longer the device with most takes than devices do in the mean, as a share: 0 if all take as long.

    Raises:
        ValueError: for no devices, or none that has anything to do.
    """
    each = list(loads)
    if not each or not sum(each) > 0:
        raise ValueError(f"imbalance: `loads` must have a sum above 0, got {each}")
    return max(each) / (sum(each) / len(each)) - 1
