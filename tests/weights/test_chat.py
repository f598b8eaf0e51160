"""Chat templates: whitespace rules, the sandbox, and refusals."""

import pytest

from kvjax.weights.chat import render

HI = [{"role": "user", "content": "hi <b>"}]


def test_blocks_leave_no_whitespace_as_in_transformers():
    template = "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}|\n  {% endif %}\n{% endfor %}"
    assert render(template, HI) == "hi <b>|\n"


def test_json_is_not_escaped_and_loops_may_break():
    assert render("{{ messages | tojson }}", HI) == '[{"role": "user", "content": "hi <b>"}]'
    assert render("{% for m in messages %}x{% break %}{% endfor %}", HI * 2) == "x"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only two') }}",
        "{% if %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_that_refuses_is_a_value_error(template):
    with pytest.raises(ValueError, match="chat: the template refuses"):
        render(template, HI)


def test_a_message_without_content_is_named():
    with pytest.raises(ValueError, match=r"message 1 must have `role` and `content`, it has \['role'\]"):
        render("", [*HI, {"role": "user"}])


@pytest.mark.real
def test_the_default_models_template(smollm2):
    tokenizer = smollm2[2]
    text = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer.encode(text)[0] == 1
