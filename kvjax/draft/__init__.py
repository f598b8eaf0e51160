"""Speculative decoding: cheap guesses at the next tokens, and the loop that has the model check them."""

from kvjax.draft.base import Draft, View
from kvjax.draft.chain import Chain
from kvjax.draft.exit import EarlyExit
from kvjax.draft.heads import Heads
from kvjax.draft.kept import load_draft, save_draft
from kvjax.draft.lookup import PromptLookup
from kvjax.draft.model import DraftModel
from kvjax.draft.speculation import Speculated, speculate, stream
from kvjax.draft.state import Speculation, widths
from kvjax.draft.tree import Branches, Tree

__all__ = [
    "Branches",
    "Chain",
    "Draft",
    "DraftModel",
    "EarlyExit",
    "Heads",
    "PromptLookup",
    "Speculated",
    "Speculation",
    "Tree",
    "View",
    "load_draft",
    "save_draft",
    "speculate",
    "stream",
    "widths",
]
