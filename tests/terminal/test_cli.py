import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import kvjax
from kvjax import Sampling, cli
from kvjax.cache import Dense
from tests.terminal.processes import call, environment, start
from tests.tiny_model import bytes_tokenizer, save_tiny


@pytest.fixture
def generate(kvjax_here, model):
    return lambda *args, text="": kvjax_here("generate", *args, "--model", model, text=text)


def parsed(result):
    code, out, err = result
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def expected(model, prompt, max_new, capacity=256, **sampling):
    net, params, tokenizer = kvjax.load(model)
    cache = kvjax.cache.Dense().init(net, batch=1, capacity=capacity)
    rules = kvjax.Sampling(stop=tokenizer.stop_ids, **sampling)
    ids = [tokenizer.encode(prompt)]
    out = kvjax.generate(net, params, cache, ids, max_new=max_new, sampling=rules, tokenizer=tokenizer)
    return out.tokens[0, : int(out.lengths[0])].tolist()


def test_generate_json_is_what_generate_gives(generate, model):
    result = parsed(generate("Hello", "--max-new", "12", "--json", "--raw"))
    assert result["tokens"] == expected(model, "Hello", 12)
    assert result["prompt_tokens"] == 5 and result["new_tokens"] == len(result["tokens"])
    assert result["reason"] in ("limit", "stop token")
    assert result["cache_bytes"] == 2 * 2 * 2 * 8 * 256 * 4 + 2 * 4 + 4
    assert result["first_token_s"] > 0 and result["load_s"] > 0 and result["ms_per_token"] > 0


def test_generate_streams_whole_characters_and_one_summary_line(generate, model):
    args = ("Hello", "--max-new", "40", "--raw")
    code, out, err = generate(*args)
    assert code == 0
    assert out == parsed(generate(*args, "--json"))["text"] + "\n"
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    for word in ("tokens", "first after", "ms a token", "cache 65.5 kB", "ended by"):
        assert word in lines[0]


def test_generate_reads_standard_input_and_applies_the_chat_template(generate, model):
    result = parsed(generate("-", "--max-new", "4", "--json", text="hé\n"))
    prompt = bytes_tokenizer().chat([{"role": "user", "content": "hé\n"}])
    assert result["prompt_tokens"] == len(bytes_tokenizer().encode(prompt))
    assert result["tokens"] == expected(model, prompt, 4)


def test_generate_cuts_at_a_stop_text(generate, model):
    whole = parsed(generate("Hello", "--max-new", "40", "--json", "--raw"))["text"]
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if whole[i : i + 2].isascii())
    args = ("Hello", "--max-new", "40", "--raw", "--stop", stop)
    result = parsed(generate(*args, "--json"))
    assert result["text"] == whole[: whole.index(stop)]
    assert result["reason"] == "stop string"
    assert generate(*args)[1] == result["text"] + "\n"


def test_several_answers_are_those_of_sample_n_and_beam(generate, model):
    net, params, tokenizer = kvjax.load(model)
    ids = tokenizer.encode("Hello")

    def cache():
        return Dense().init(net, batch=1, capacity=64)

    args = ("Hello", "--raw", "--max-new", "9")
    result = parsed(generate(*args, "--n", "3", "--temperature", "0.9", "--top-k", "5", "--seed", "4", "--json"))
    rules = Sampling(temperature=0.9, top_k=5, seed=4, stop=tokenizer.stop_ids)
    key = jax.random.key(4)
    out = kvjax.sample_n(
        net, params, cache(), [ids], n=3, max_new=9, key=key, sampling=rules, tokenizer=tokenizer, capacity=9
    )
    wanted = [row[:n].tolist() for row, n in zip(np.asarray(out.tokens), out.lengths, strict=True)]
    assert [answer["tokens"] for answer in result["answers"]] == wanted and len(set(map(tuple, wanted))) > 1
    assert result["new_tokens"] == sum(map(len, wanted)) and result["tokens_per_s"] > 0
    beams = parsed(generate(*args, "--beam", "4", "--n", "2", "--json"))["answers"]
    out = kvjax.beam(net, params, cache(), [ids], beams=4, max_new=9, stop=tokenizer.stop_ids)
    assert [answer["tokens"] for answer in beams] == [
        np.asarray(out.tokens)[i, : out.lengths[i]].tolist() for i in (0, 1)
    ]
    pages = ("--cache", "paged:page=8", "--capacity", "16")  # two pages for a row, and three rows need more
    paged = parsed(generate(*args, *pages, "--n", "3", "--temperature", "0.9", "--top-k", "5", "--seed", "4", "--json"))
    assert [answer["tokens"] for answer in paged["answers"]] == wanted
    code, text, err = generate(*args, "--beam", "4")
    assert code == 0 and text.startswith("[1] ") and beams[0]["text"] in text and "1 answers" in err


def test_an_answer_keeps_to_a_schema(generate, tmp_path):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22, "x"]}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    for how in (
        ("--schema", str(tmp_path / "s.json")),
        ("--schema", json.dumps(schema)),
        ("--schema", json.dumps(schema), "--draft", "lookup"),
    ):
        answer = parsed(generate("Hello", "--raw", "--max-new", "40", "--json", *how))
        assert json.loads(answer["text"])["n"] in (1, 22, "x")
    answer = parsed(generate("Hello", "--raw", "--max-new", "9", "--json", "--regex", "(ab|ba){2}"))
    assert answer["text"] in ("abab", "abba", "baab", "baba")


def test_generate_samples_by_seed_and_other_caches(generate, model):
    def tokens(*args):
        return parsed(generate("Hello", "--max-new", "12", "--json", "--raw", *args))["tokens"]

    warm = ("--temperature", "1.5", "--top-k", "50")
    assert tokens(*warm, "--seed", "3") == tokens(*warm, "--seed", "3") != tokens(*warm, "--seed", "4")
    assert tokens("--cache", "ring:window=64,sinks=2") == tokens()
    assert tokens("--cache", "quantized:bits=2,residual=64") == tokens()


BAD = {
    "empty prompt": (["generate", ""], "the prompt is empty"),
    "no such model": (["generate", "x", "--model", "/nowhere.gguf"], "'/nowhere.gguf' does not exist"),
    "unknown cache": (
        ["generate", "x", "--cache", "dence"],
        "expected one of dense, evicting, paged, quantized, ring, shared, got 'dence'; did you mean",
    ),
    "unknown cache setting": (["generate", "x", "--cache", "ring:windows=3"], "ring has the settings window, sinks"),
    "bad cache setting": (["generate", "x", "--cache", "ring:window=0"], "`window` must be at least 1"),
    "cache setting of another type": (["generate", "x", "--cache", "ring:window=a"], "wrong type"),
    "prompt beyond the capacity": (["generate", "x" * 40, "--capacity", "32"], "--capacity is 32"),
    "max-new beyond the model": (["generate", "x", "--max-new", "100000"], "65536: give --max-new"),
    "max-new of nothing": (["generate", "x", "--max-new", "0"], "`max_new` must be at least 1"),
    "n without a temperature": (["generate", "x", "--n", "2"], "--n without a --temperature"),
    "n of nothing": (["generate", "x", "--n", "0"], "--n must be at least 1"),
    "more answers than beams": (["generate", "x", "--n", "3", "--beam", "2"], "at most the --beam's 2"),
    "a beam that samples": (["generate", "x", "--beam", "2", "--temperature", "1"], "leave out --temperature"),
    "a draft for several": (["generate", "x", "--beam", "2", "--draft", "lookup"], "leave it out with --n or --beam"),
    "schema and regex": (["generate", "x", "--schema", "{}", "--regex", "a"], "give one of them"),
    "no schema": (["generate", "x", "--schema", "/nowhere"], "cannot be read as a file"),
    "bad schema": (["generate", "x", "--schema", "{"], "--schema: expected JSON"),
    "impossible schema": (["generate", "x", "--schema", '{"type": "number", "oneOf": []}'], "oneOf"),
    "bad temperature": (["generate", "x", "--temperature", "-1"], "`temperature` must be finite and at least 0"),
    "no such config": (["experiment", "nothing"], "'nothing' is no file"),
}


@pytest.mark.parametrize(("args", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(args, sentence, model, kvjax_here):
    if args[0] == "generate" and "--model" not in args:
        args = [*args, "--model", model]
    code, out, err = kvjax_here(*args)
    assert code == 2
    assert out == "" and sentence in err and err.count("\n") == 1 and err.startswith("kvjax: ")


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("KVJAX_DEBUG", "1")
    with pytest.raises(ValueError, match="the prompt is empty"):
        cli.main(["generate", ""])


@pytest.mark.parametrize("args", [["generate"], ["generate", "x", "--max-new", "many"], ["sing"], []], ids=str)
def test_wrong_arguments_exit_with_2(args, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2


@pytest.mark.parametrize("command", ["generate", "chat", "doctor", "experiment"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and f"kvjax {command}" in out and "Example:" in out


def test_a_process_streams_the_same_text_twice(home, model):
    """The second start finds its programs compiled, and must not run others."""
    args = ("generate", "Hello", "--raw", "--max-new", "12", "--model", model)
    first, second = call(home, *args), call(home, *args)
    assert first[:2] == second[:2] and first[0] == 0 and len(first[1]) > 1
    assert any((home / "compiled").iterdir())


def test_help_loads_no_jax(home):
    code = (
        "import sys\nfrom kvjax.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(f'loaded: {loaded}' if (loaded := {'jax', 'numpy', 'flax'} & set(sys.modules)) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment(home), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_interrupted_generation_exits_with_130(home, model):
    process = start(home, "generate", "Hello", "--raw", "--max-new", "60000", "--model", model)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_reader_that_leaves_ends_it_quietly(home, model):
    process = start(home, "generate", "Hello", "--raw", "--max-new", "60000", "--model", model)
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=30) == cli.PIPE_CLOSED
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.stdin.close()


def test_terminal_is_left_whole_by_ctrl_c(home, model):
    """On a real terminal the spinner hides the cursor; however the run ends, it is shown again."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "kvjax", "generate", "Hello", "--raw", "--max-new", "60000", "--model", model]
    process = subprocess.Popen(command, env=environment(home, TERM="xterm"), stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    seen, sent, deadline = b"", False, time.monotonic() + 40
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            seen += chunk
        if not sent and b"loading" in seen:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(leader)
    assert process.wait(timeout=30) == 130
    hidden, shown = seen.rfind(b"\x1b[?25l"), seen.rfind(b"\x1b[?25h")
    assert 0 <= hidden < shown and b"Traceback" not in seen


def test_doctor(home):
    code, out, _ = call(home, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and not found["missing"]
    assert found["versions"]["kvjax"] == kvjax.__version__ and found["versions"]["jax"]
    assert found["devices"] and found["kernels"]["path"].endswith("kernels/__init__.py")
    assert found["cache_folder"]["path"] == str(home) and found["compile_cache"]["writable"]
    assert all(line.startswith("pip install") for line in found["installs"].values())


def test_doctor_says_what_the_device_can_do_once_it_is_measured(home, monkeypatch, capsys):
    from kvjax.terminal import doctor
    from tests.accelerate.made_up import FACTS
    from tests.accelerate.test_facts import module

    monkeypatch.setenv("KVJAX_CACHE", str(home))
    found = replace(FACTS, bandwidths={"read": 3e12, "add": 2e12, "copy": 2.5e12, "update": 1e12}, date="2026-01-02T03")
    found = replace(found, flops={"bfloat16": 7e14, "float32": 4e14}, launch=2e-6, call=1e-5)
    monkeypatch.setattr(module, "measure", lambda device, tell: found)
    assert doctor.run(as_json=False) == 0
    assert "not measured: kvjax doctor --measure" in capsys.readouterr().out
    assert doctor.run(as_json=False, measure=True) == doctor.run(as_json=False) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "device facts" in line]
    assert len(told) == 2 and told[0] == told[1]
    assert "reads 3,000 GB/s, copies 2,500 GB/s, multiplies 700 (bfloat16) and 400 (float32) TFLOP/s" in told[0]
    assert "launches in 2 µs, calls in 10 µs (2026-01-02)" in told[0]


def test_doctor_counts_tuned_shapes_and_gpus():
    from kvjax.terminal.doctor import accelerate_lines

    gpu = {"name": "NVIDIA H200", "used": 2 * 10**9, "total": 150 * 10**9, "utilisation": 0.97}
    found = {"facts": None, "tuned": {"user": 2, "package": 5}, "gpus": [gpu], "no_gpus": None}
    lines = dict(accelerate_lines(found))
    assert lines["tuned kernels"] == "7 shapes, 2 of them your own"
    assert lines["gpu now"] == "NVIDIA H200: 2.0 GB of 150.0 GB, busy 97%"
    none = {"facts": None, "tuned": {"user": 0, "package": 0}, "gpus": [], "no_gpus": "no driver"}
    assert dict(accelerate_lines(none))["gpu now"] == "no driver" and accelerate_lines(None) == []


def test_doctor_tells_a_shadowed_kernels_and_a_missing_part(tmp_path, monkeypatch, capsys):
    from kvjax.terminal import doctor

    fake = tmp_path / "kernels"
    fake.mkdir()
    (fake / "__init__.py").write_text("__version__ = '9'\n")
    script = "import sys; sys.path.insert(0, sys.argv[1]); from kvjax.cli import main; sys.exit(main(['doctor']))"
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(tmp_path), capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"{fake / '__init__.py'} hides kvjax's own module `kernels`" in run.stdout

    monkeypatch.setitem(doctor.NEEDED, "nosuchpackage", "nosuchpackage.inner")
    assert doctor.run(as_json=False) == 1
    assert "missing: nosuchpackage. pip install nosuchpackage" in capsys.readouterr().out


@pytest.mark.real
def test_the_real_model_answers(home):
    result = parsed(call(home, "generate", "What is the capital of France?", "--json", KVJAX_CACHE=str(_user_cache())))
    assert result["text"] == "The capital of France is Paris."
    assert result["reason"] == "stop token"


def _user_cache():
    from kvjax.paths import cache_dir

    return cache_dir()


def test_ids_that_the_tokenizer_has_no_text_for_are_never_drawn(kvjax_here, tmp_path):
    """As where a vocabulary is padded to a round number: a hot model would draw one in three of them here."""
    wide = str(save_tiny(tmp_path / "wide", vocab=400))
    args = ("Hello", "--model", wide, "--max-new", "40", "--raw", "--temperature", "50", "--json")
    result = parsed(kvjax_here("generate", *args))
    assert len(result["tokens"]) > 4 and max(result["tokens"]) < 258
    args = ("Hello", "--model", wide, "--max-new", "24", "--raw", "--beam", "3", "--n", "3", "--json")
    answers = parsed(kvjax_here("generate", *args))["answers"]
    assert max(max(answer["tokens"]) for answer in answers) < 258


@pytest.mark.parametrize("how", ["lookup", "lookup:k=3,shortest=1", "model:{model},k=2"])
def test_a_draft_changes_the_pace_and_not_the_answer(generate, model, how):
    args = ("Hello Hello Hello", "--max-new", "24", "--raw")
    result = parsed(generate(*args, "--json", "--draft", how.format(model=model)))
    assert result["tokens"] == expected(model, "Hello Hello Hello", 24)
    assert 0 <= result["accepted"] <= result["proposed"]
    code, out, err = generate(*args, "--draft", how.format(model=model))
    assert code == 0 and out == result["text"] + "\n"
    said = re.search(r"(\d+) of (\d+) guesses right", err)  # how many are made depends on what a call took
    assert said is not None and int(said[1]) <= int(said[2])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("lokup", "got 'lokup'; did you mean 'lookup'?"),
        ("lookup:n=3", "lookup has the settings k, longest, shortest, whole numbers, got 'n=3'"),
        ("lookup:k=0", "`k` must be at least 1"),
        ("model", "`model` needs a path"),
        ("heads", "`heads` needs a path"),
    ],
)
def test_a_draft_that_is_none_is_refused_with_a_sentence(generate, how, words):
    code, out, err = generate("Hello", "--draft", how)
    assert code == 2 and words in err and not out
