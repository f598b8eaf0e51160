"""Speculative decoding: cheap guesses at the next tokens, and the loop that has the model check them."""

from kvjax.draft.base import Draft, View
from kvjax.draft.chain import Chain
from kvjax.draft.lookup import PromptLookup
from kvjax.draft.model import DraftModel
from kvjax.draft.speculation import Speculated, speculate, stream
from kvjax.draft.state import Speculation, widths

__all__ = [
    "Chain",
    "Draft",
    "DraftModel",
    "PromptLookup",
    "Speculated",
    "Speculation",
    "View",
    "speculate",
    "stream",
    "widths",
]
