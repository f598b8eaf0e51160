"""What a draft is: `init`, `propose`, `observe`, as pure functions over a pytree of its own."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from kvjax.config import ModelConfig
from kvjax.decode.sampling import Rules
from kvjax.pytree import pytree


@pytree
class View:
    """What a draft may look at: each row's text so far, its newest token included, and how its next one is chosen.

    Args:
        text: prompt and new tokens; what is past a row's `length` says nothing.
        position: of the token after the newest, in the target's cache. The draw of a row that samples depends on it.
        made: new tokens a row has.
        seen, counts: which tokens prompt and output have, and how often the output has each.
        hidden, fresh: for a draft whose `wants_hidden` is true, what the target's head saw at each row's `fresh` tokens
            before its newest, those that were checked since the draft last looked. None of the prompt but its last.
        ruled: each row's state in its grammar, for `choose`.
    """

    text: Int[Array, "batch size"]
    length: Int[Array, "batch"]
    running: Bool[Array, "batch"]
    position: Int[Array, "batch"]
    made: Int[Array, "batch"]
    seen: Bool[Array, "batch vocab"]
    counts: Int[Array, "batch vocab"]
    rules: Rules
    hidden: Float[Array, "batch checked hidden"] | None = None
    fresh: Int[Array, "batch"] | None = None
    ruled: Int[Array, "batch"] | None = None


@runtime_checkable
class Draft(Protocol):
    """A pytree whose settings are static. Guesses cost speed when they are wrong, never a token."""

    @property
    def most(self) -> int:
        """Guesses a row, at most."""
        ...

    def check(self, target: ModelConfig) -> None:
        """Raise ValueError, with a sentence, for a target that the draft cannot guess for."""
        ...

    def init(self, batch: int, size: int) -> Any:
        """The draft's state before `batch` rows of up to `size` tokens."""
        ...

    def propose(self, own: Any, view: View, want: Int[Array, ""]) -> tuple[Any, Any, Any]:
        """Up to `want` guesses at what follows a row's newest token, how many each row has, and the state after.

        A draft whose static `makes_trees` is true gives a `Tree` of them, and as many as it likes if `want` is not 0.
        """
        ...

    def observe(self, own: Any, view: View) -> Any:
        """The state once the text has grown to what `view` shows; called each time that it has.

        A row whose length is 0 is about to begin another text.
        """
        ...


def wants_hidden(draft: Any) -> bool:
    """Whether a draft asks for `View.hidden`, by a static property of this name; one without it does not."""
    return bool(getattr(draft, "wants_hidden", False))


def makes_trees(draft: Any) -> bool:
    """Whether a draft's guesses are a `Tree`, by a static property of this name; one without it makes chains."""
    return bool(getattr(draft, "makes_trees", False))


def check_most(draft: Any, most: int) -> None:
    """Raise ValueError if a draft's `k` is no positive number."""
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"{type(draft).__name__}: `k` must be at least 1, a whole number, got {most!r}")
