"""Slots, who sits in them and who waits, as a value: how it is set, and how it begins."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Key

from kvjax.batch.parking import Parked, check_way
from kvjax.batch.request import Request
from kvjax.batch.slots import Slots, init
from kvjax.cache.base import Strategy
from kvjax.cache.prefix import Policy, PrefixStore, open_store
from kvjax.decode.generation import check_counts, check_number
from kvjax.draft.base import Draft
from kvjax.draft.costs import check_costs
from kvjax.draft.state import widths
from kvjax.model import Params, Transformer


@dataclass(frozen=True)
class Settings:
    """How slots are served.

    Args:
        chunk: prompt tokens that a filling row takes in at once, at most, while others wait to decode on.
        steps: of decoding between two looks at who waits, at most.
        patience: seconds of waiting that count for one of priority; infinite for waiting not to count.
        preempt: what becomes of a row's keys when it must give it up: `"recompute"`, `"offload"` or `"compress"`.
            What is kept in 8 bits is no longer exact; a lossy cache may come to keep other tokens when recomputed.
        draft, costs: as `batch.decode` takes them; costs that are not given are measured in the first turns, where
            pages are there for `longest_timed` tokens a row: 5 `steps` at most.
        prefill: model and parameters that prompts are taken in by, of the same config, such as one of less precision.
    """

    chunk: int = 256
    steps: int = 16
    patience: float | int = 10
    preempt: str = "recompute"
    draft: Draft | None = None
    costs: Sequence[float] | None = None
    prefill: tuple[Transformer, Params] | None = None
    tokenizer: Any = None

    def __post_init__(self):
        check_counts("Settings", chunk=self.chunk, steps=self.steps)
        check_number("Settings", "patience", self.patience, above=0)
        if self.prefill is not None and not (
            isinstance(self.prefill, tuple) and len(self.prefill) == 2 and isinstance(self.prefill[0], Transformer)
        ):
            raise ValueError(
                f"Settings: `prefill` must be a model and its parameters, got {type(self.prefill).__name__}"
            )


@dataclass(frozen=True)
class Ticket:
    """A request on its way: `number` came before it; `kept` is what it left its row with, if it has had one."""

    request: Request
    number: int
    arrived: float
    first: float | None = None
    reused: int = 0
    parked: int = 0
    kept: Parked | None = None


@dataclass(frozen=True)
class Serving:
    """Slots, who is in them, and who waits. A value: what takes it gives a new one, and its arrays are donated."""

    slots: Slots
    settings: Settings
    key: Key[Array, ""] | None
    store: PrefixStore | None = None
    seated: tuple[Ticket | None, ...] = ()
    waiting: tuple[Ticket, ...] = ()
    count: int = 0
    names: frozenset[Hashable] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not any(self.seated)


def open(
    model: Transformer,
    strategy: Strategy,
    *,
    slots: int,
    capacity: int,
    max_new: int,
    key: Key[Array, ""] | None = None,
    store: Policy[Any] | None = None,
    settings: Settings | None = None,
    ids: int = 16,
) -> Serving:
    """Free slots, and nobody waiting.

    Args:
        store: the policy of a prefix store; None for no store. Needs a `Paged` strategy.
        **others: as `batch.init` takes them.
    Raises:
        ValueError: for what `batch.init` refuses, or a way to preempt or a store that does not go with the strategy.
    """
    settings = Settings() if settings is None else settings
    made = init(
        model, strategy, slots=slots, capacity=capacity, max_new=max_new, draft=settings.draft, key=key, ids=ids
    )
    check_way(made, settings.preempt, "batch.open")
    if settings.prefill is not None and settings.prefill[0].config != model.config:
        raise ValueError("batch.open: `prefill` must be of the model's config; only its precision may differ")
    if settings.draft is not None:
        check_costs(settings.costs, widths(settings.draft), "batch.open")
    kept = None if store is None else open_store(made.cache, store)
    return Serving(made, settings, key, kept, (None,) * slots)


def with_seat(serving: Serving, row: int, ticket: Ticket | None) -> Serving:
    """The same with a request in a row, or nobody."""
    return replace(serving, seated=tuple(ticket if i == row else t for i, t in enumerate(serving.seated)))
