"""From prompts to tokens: prefill, one step, the compiled loop, and how a token is chosen."""

from kvjax.decode.beam import beam
from kvjax.decode.generation import Output, Step, generate, stream
from kvjax.decode.parallel import best_of, majority, sample_n
from kvjax.decode.sampling import Rules, Sampling, rules
from kvjax.decode.state import REASONS, State, advance, begin, emit
from kvjax.decode.step import BUCKETS, decode_step, forward, prefill

__all__ = [
    "BUCKETS",
    "REASONS",
    "Output",
    "Rules",
    "Sampling",
    "State",
    "Step",
    "advance",
    "beam",
    "begin",
    "best_of",
    "decode_step",
    "emit",
    "forward",
    "generate",
    "majority",
    "prefill",
    "rules",
    "sample_n",
    "stream",
]
