"""Who gets how many bits: one option a group, least cost within a byte budget.

The problem is a value, so that any optimizer can be given the same one: greedy and exact here, others elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Choose an option for each group.

    Args:
        groups: what is chosen for, such as `layer 3 keys`.
        options: what may be chosen, such as bits an element.
        cost: of each choice, in any unit; costs of different groups add up.
        bytes: of each choice.
        budget: bytes that all choices together may take.
        allowed: choices that may be made; all if None.
    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, or a budget below the cheapest choices.
    """

    groups: tuple[str, ...]
    options: tuple[int, ...]
    cost: Float[np.ndarray, "groups options"]
    bytes: Int[np.ndarray, "groups options"]
    budget: int
    allowed: Bool[np.ndarray, "groups options"] | None = None

    def __post_init__(self):
        shape = (len(self.groups), len(self.options))
        for name, table in (("cost", self.cost), ("bytes", self.bytes), ("allowed", self.may)):
            if table.shape != shape:
                raise ValueError(f"AllocationProblem: `{name}` must be {shape}, groups by options, got {table.shape}")
        if not np.isfinite(self.cost).all():
            raise ValueError("AllocationProblem: `cost` must be finite; forbid a choice by `allowed`")
        if lacking := [group for i, group in enumerate(self.groups) if not self.may[i].any()]:
            raise ValueError(f"AllocationProblem: `allowed` leaves no option for {', '.join(lacking)}")
        if self.least > self.budget:
            raise ValueError(
                f"AllocationProblem: `budget` must be at least {self.least} bytes, the cheapest choice of every "
                f"group, got {self.budget}"
            )

    @property
    def may(self) -> Bool[np.ndarray, "groups options"]:
        """`allowed`, spelled out."""
        return np.ones(self.cost.shape, bool) if self.allowed is None else self.allowed

    @property
    def least(self) -> int:
        """Bytes of the cheapest choices."""
        return int(np.where(self.may, self.bytes, np.iinfo(np.int64).max).min(1).sum())

    def judge(self, choice: Int[np.ndarray, "groups"]) -> tuple[float, int]:
        """Cost and bytes of the option taken (its index) for each group."""
        rows = np.arange(len(self.groups))
        return float(self.cost[rows, choice].sum()), int(self.bytes[rows, choice].sum())


def greedy(problem: AllocationProblem) -> Int[np.ndarray, "groups"]:
    """From the cheapest choices, make the change that saves most cost a byte, as long as one fits.

    Steps may skip options, so that one that is worse than both its neighbours' mean blocks nothing. Its cost is at
    most one step's saving above the best.
    """
    cost, size, may = problem.cost, problem.bytes.astype(np.int64), problem.may
    rows = np.arange(len(problem.groups))
    least = np.where(may, size, np.iinfo(np.int64).max).min(1, keepdims=True)
    choice = np.where(may & (size == least), cost, np.inf).argmin(1)
    while True:
        more = size - size[rows, choice][:, None]
        saved = cost[rows, choice][:, None] - cost
        left = problem.budget - size[rows, choice].sum()
        fits = may & (saved > 0) & (more <= left)
        if not fits.any():
            return choice
        rate = np.where(fits, saved / np.maximum(more, 1e-9), -np.inf)
        group, option = np.unravel_index(rate.argmax(), rate.shape)
        choice[group] = option


def exact(problem: AllocationProblem) -> Int[np.ndarray, "groups"]:
    """The least cost there is, by mixed-integer programming (HiGHS, through SciPy).

    Raises:
        RuntimeError: if the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups, options = problem.cost.shape
    one_each = np.kron(np.eye(groups), np.ones(options))
    result = milp(
        problem.cost.reshape(-1),
        integrality=np.ones(groups * options),
        bounds=Bounds(0, problem.may.reshape(-1).astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(problem.bytes.reshape(1, -1).astype(float), -np.inf, problem.budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"exact: the solver found nothing: {result.message}")
    return result.x.reshape(groups, options).argmax(1)


SOLVERS = {"greedy": greedy, "exact": exact}
"""Every solver by name."""
