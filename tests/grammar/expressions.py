"""Small regular expressions, and an oracle for them that knows nothing of automata: Brzozowski's derivatives (1964)."""

from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner
from tokenizers.models import BPE

from kvjax.weights import Tokenizer

PIECES = [
    *"abcd",
    "ab",
    "bc",
    "abc",
    "aa",
    "ba",
    "cd",
    "dd",
    "cab",
    "bb",
    "ac",
    *"0123456789",
    *"efghijklmnopqrstuvwxyz",
]
PIECES += [*"ABCDEFGHIJKLM", "!"]
END = 60


def small_tokenizer() -> Tokenizer:
    """61 tokens, some of which are several letters; the last ends a text."""
    pieces = PIECES[:END]
    inner = Inner(BPE({piece: i for i, piece in enumerate(pieces)}, []))
    inner.add_special_tokens([AddedToken("<end>")])
    return Tokenizer(inner, True, frozenset({END}), frozenset({END}), None, END, (END,))


NEVER, EMPTY = ("never",), ("empty",)

expressions = st.recursive(
    st.sampled_from("abcd").map(lambda letter: ("letter", letter)),
    lambda inner: (
        st.tuples(st.just("then"), inner, inner)
        | st.tuples(st.just("or"), inner, inner)
        | st.tuples(st.just("star"), inner)
    ),
    max_leaves=6,
)


def pattern(e) -> str:
    kind = e[0]
    if kind == "letter":
        return e[1]
    if kind == "star":
        return f"(?:{pattern(e[1])})*"
    return f"(?:{pattern(e[1])}{'|' if kind == 'or' else ''}{pattern(e[2])})"


def may_end(e) -> bool:
    if e[0] in ("then", "or"):
        return (all if e[0] == "then" else any)(may_end(part) for part in e[1:])
    return e[0] in ("empty", "star")


def after(e, letter: str):
    """What may follow `letter`."""
    if e[0] == "letter":
        return EMPTY if e[1] == letter else NEVER
    if e[0] == "or":
        return _or(after(e[1], letter), after(e[2], letter))
    if e[0] == "then":
        first = _then(after(e[1], letter), e[2])
        return _or(first, after(e[2], letter)) if may_end(e[1]) else first
    return _then(after(e[1], letter), e) if e[0] == "star" else NEVER


def after_text(e, text: str):
    for letter in text:
        e = after(e, letter)
    return e


def _or(a, b):
    return b if a == NEVER else a if b == NEVER or a == b else ("or", a, b)


def _then(a, b):
    return NEVER if NEVER in (a, b) else b if a == EMPTY else a if b == EMPTY else ("then", a, b)
