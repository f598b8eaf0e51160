"""Render a chat template, as `transformers` does: Jinja in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


def render(template: str, messages: Sequence[Mapping[str, Any]], **names: Any) -> str:
    """The text of a conversation.

    Raises:
        ValueError: if a message has no role or content, or the template is broken or refuses the messages.
    """
    from jinja2 import TemplateError

    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"chat: message {i} must have `role` and `content`, it has {sorted(message)}")
    try:
        return _compiled(template).render(messages=list(messages), **names)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"chat: the template refuses these messages: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own escapes for HTML

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    names: dict[str, Any] = {"raise_exception": refuse, "strftime_now": now}
    environment.globals.update(names)
    return environment.from_string(template)
