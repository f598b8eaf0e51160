"""A tiny random model with a tokenizer, saved to a folder as `kvjax.load` takes it."""

from dataclasses import replace
from pathlib import Path

import jax
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import kvjax
from kvjax.weights import Tokenizer
from kvjax.weights.tokenizer import byte_alphabet
from tests.tiny import LLAMA

END = 257
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and the two markers of a chat."""
    inner = Inner(BPE({char: i for i, char in enumerate(byte_alphabet())}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False, use_regex=False), Decoder()
    inner.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    marks = frozenset({256, END})
    return Tokenizer(inner, True, marks, marks, None, END, (END,), template=TEMPLATE)


def save_tiny(folder: Path, **changes) -> Path:
    """A model of 260 tokens whose text is noise, but always the same noise."""
    model = kvjax.Transformer(replace(LLAMA, **{"vocab": 260, **changes}))
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, kvjax.init_params(model, jax.random.key(7)))
    kvjax.save_model(folder, (model, params, bytes_tokenizer()))
    return folder
