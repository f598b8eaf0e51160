"""A conversation as a value: its messages, its tokens, and the cache that holds the first of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvjax.cache import Cache
from kvjax.terminal.answer import Answer
from kvjax.weights import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """What was said so far.

    Args:
        messages: `{"role": …, "content": …}` each.
        text: the conversation as the template renders it, up to the end of what was said last.
        ids: its tokens as the model met them; those of answers are the ones it chose.
        cache: holds the first `held` of `ids`; None holds nothing.
    """

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    ids: tuple[int, ...] = ()
    cache: Cache | None = None

    @property
    def held(self) -> int:
        return 0 if self.cache is None else int(self.cache.length[0])


def begin(system: str | None) -> Conversation:
    """Nothing said yet, but for the system message."""
    return Conversation(() if system is None else ({"role": "system", "content": system},))


def ask(conversation: Conversation, tokenizer: Tokenizer, message: str) -> Conversation:
    """The conversation with one more message of the user's; what the cache holds stays usable.

    If the template renders earlier messages differently than they were met (some trim answers), everything
    is tokenised anew, and the cache is let go.
    """
    messages = (*conversation.messages, {"role": "user", "content": message})
    text = tokenizer.chat(messages)
    if not conversation.ids or not text.startswith(conversation.text):
        return Conversation(messages, text, tuple(tokenizer.encode(text)))
    tail = tokenizer.encode(text[len(conversation.text) :], add_bos=False)
    if conversation.ids[-1] in tokenizer.stop_ids and tail[:1] == [conversation.ids[-1]]:
        tail = tail[1:]  # the answer's own end is the template's
    return Conversation(messages, text, (*conversation.ids, *tail), conversation.cache)


def told(conversation: Conversation, tokenizer: Tokenizer, answer: Answer) -> Conversation:
    """The conversation with the model's answer to it, all or as much as came before an interruption."""
    said = tokenizer.decode(answer.tokens, skip_special=True)
    return replace(
        conversation,
        messages=(*conversation.messages, {"role": "assistant", "content": said}),
        text=conversation.text + said,
        ids=(*conversation.ids, *answer.tokens),
        cache=None if answer.output is None else answer.output.cache,
    )
