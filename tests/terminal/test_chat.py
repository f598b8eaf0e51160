import contextlib
import json
import re
import signal
import subprocess
from dataclasses import replace

import pytest

from kvjax.terminal.answer import Answer
from kvjax.terminal.conversation import Conversation, ask, begin, told
from tests.terminal.processes import start
from tests.tiny_model import END, bytes_tokenizer

TOKENIZER = bytes_tokenizer()


def said(tokens):
    return Answer("", tuple(tokens), "limit", 0.1, 0.1, None)


@pytest.mark.parametrize("answer", [[*b"fine", END], [*b"fine"], [END], [*b"x\n"]], ids=str)
def test_a_turn_adds_only_what_is_new(answer):
    """However the answer ended, the tokens are those of the whole conversation tokenised at once."""
    first = ask(begin("Be brief."), TOKENIZER, "Hi")
    then = told(first, TOKENIZER, said(answer))
    second = ask(then, TOKENIZER, "And?")
    assert second.ids[: len(then.ids)] == then.ids
    assert list(second.ids) == TOKENIZER.encode(TOKENIZER.chat(second.messages))
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user"]


def test_a_template_that_changes_earlier_text_starts_anew():
    trims = replace(TOKENIZER, template=TOKENIZER.template.replace("m.content", "m.content | trim"))
    then = told(ask(begin(None), trims, "Hi"), trims, said(b" spaced "))
    second = ask(replace(then, cache=None), trims, "And?")
    assert list(second.ids) == trims.encode(trims.chat(second.messages)) and second.cache is None


def test_nothing_is_held_without_a_cache():
    assert Conversation().held == 0


@pytest.fixture
def chat(kvjax_here, model):
    def chat(text, *args):
        code, out, err = kvjax_here("chat", "--model", model, "--max-new", "8", *args, text=text)
        assert code == 0, err
        return out, err

    return chat


@pytest.fixture
def turns(chat):
    def turns(text, *args):
        out, err = chat(text, "--json", *args)
        return [json.loads(line) for line in out.splitlines()], err

    return turns


def test_later_turns_read_only_what_is_new_and_answer_as_if_read_at_once(turns, model):
    both, _ = turns("Hello\nAgain\n")
    assert len(both) == 2
    rest = TOKENIZER.encode("\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n")
    if both[0]["reason"] != "stop token":
        rest.insert(0, END)
    assert both[1]["prompt_tokens"] == 1 + len(rest)  # the answer's last token was still pending

    first = TOKENIZER.chat([{"role": "user", "content": "Hello"}])
    ids = [*TOKENIZER.encode(first), *both[0]["tokens"], *rest]
    assert both[1]["tokens"] == whole_prompt(model, ids, 8)


def whole_prompt(model, ids, max_new):
    import kvjax

    net, params, tokenizer = kvjax.load(model)
    cache = kvjax.cache.Dense().init(net, batch=1, capacity=2048)
    rules = kvjax.Sampling(stop=tokenizer.stop_ids)
    out = kvjax.generate(net, params, cache, [ids], max_new=max_new, sampling=rules)
    return out.tokens[0, : int(out.lengths[0])].tolist()


def test_reset_system_and_unknown_commands(turns):
    script = "Hello\n/reset\nHello\n/system Be brief.\nHello\n/sing\n/help\n/quit\nnever read\n"
    answers, err = turns(script)
    assert len(answers) == 3
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[1]["prompt_tokens"] == answers[0]["prompt_tokens"] < answers[2]["prompt_tokens"]
    assert "There is no command /sing" in err and err.count("/reset ") >= 2


def test_a_full_context_says_what_to_do_and_goes_on(turns):
    answers, err = turns(f"Hello\n{'x' * 80}\n/reset\nHello\n", "--capacity", "64")
    assert len(answers) == 2 and answers[0]["tokens"] == answers[1]["tokens"]
    assert "The context is full" in err and "/reset" in err and "--capacity" in err


def test_plain_output_shows_text_and_speed(chat, turns):
    out, err = chat("Hello\n")
    answer = turns("Hello\n")[0][0]
    assert out == answer["text"] + "\n"
    assert f"{answer['prompt_tokens']} tokens read" in err and "tok/s" in err


def test_ctrl_c_stops_an_answer_and_the_next_turn_goes_on_from_it(home, model):
    process = start(home, "chat", "--model", model, "--max-new", "30000", "--capacity", "60000")
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"Again\n")
    process.stdin.flush()
    first = process.stderr.readline().decode()
    while process.stdout.read(1) != b"\n":  # the end of the first answer, or a line break in it
        pass
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    second = err.decode().strip().splitlines()[-1]
    counts = re.compile(r"(\d+) tokens read · (\d+) written")
    read, written = map(int, counts.search(first).groups())
    again = int(counts.search(second).group(1))
    assert "ended by interrupted" in first and written >= 1
    turn = len(TOKENIZER.encode("<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"))
    assert again == read + written + turn


def test_ctrl_c_while_waiting_for_input_leaves(home, model):
    process = start(home, "chat", "--model", model, "--max-new", "4", "--json")
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.readline()
    for _ in range(5):  # the first may still meet the answer's last moments, which it ends
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
            break
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err
