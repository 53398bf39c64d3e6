"""The chat of infer.py: its commands, its history, Ctrl-C, and a real terminal."""

import contextlib
import copy
import os
import pty
import sys
from pathlib import Path

import pytest
from helpers.programs import GREEDY, run_infer

import infer
import softprompt
from softprompt.config.arg_parser import parse_setting
from softprompt.data.dataset import question
from softprompt.data.template import Template
from softprompt.export.chat_template import add_prompt_tokens
from softprompt.generation.chat import Chat


class Typist:
    """A user at the keyboard: types the lines, a Ctrl-C for KeyboardInterrupt, and Ctrl-D at the end."""

    def __init__(self, *lines):
        self.lines, self.prompts = list(lines), []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line


def talk(model, *lines, **given):
    typist, shown = Typist(*lines), []
    Chat(model, {"do_sample": False, "max_new_tokens": 5, **given}, parse_setting, typist, shown.append).run()
    return "".join(shown), typist


def test_each_line_is_answered_by_the_current_adapter(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["first=a"])
    greedy = {"do_sample": False, "max_new_tokens": 5}
    shown, typist = talk(model, "今天", "/adapter b", "今天", "/base", "今天", "", "/adapter first", "/quit", "今天")
    answers = [model.generate("今天", adapter=name, **greedy) for name in ("first", "b", "none")]
    assert shown.split("\n")[1:] == [*answers, ""]
    assert typist.prompts == ["first> ", "first> ", "b> ", "b> ", "none> ", "none> ", "none> ", "first> "]
    assert typist.lines == ["今天"]


def test_settings_of_a_chat(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    shown, _ = talk(
        model, "/set max_new_tokens 2", "今天", "/set temperature hot", "/set temperature 0", "/set", "/set beams 2"
    )
    lines = shown.split("\n")[1:]
    assert lines[0] == model.generate("今天", do_sample=False, max_new_tokens=2)
    assert lines[1].startswith("error: --temperature") and "'hot'" in lines[1]
    assert lines[2].startswith("error: --temperature 0.0")
    assert "max_new_tokens=2" in lines[3] and "temperature=1.0" in lines[3]
    assert lines[4].startswith("error:") and "--beams" in lines[4]


def test_history_puts_earlier_turns_before_a_question(place):
    """As many turns as /history says, joined as in training, in the template of the adapter that answers."""
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["a", "b"])
    greedy, asked = {"do_sample": False, "max_new_tokens": 5}, []
    generate = model.generate

    def recorded(prompts, **given):
        asked.append(prompts)
        return generate(prompts, **given)

    model.generate = recorded
    shown, _ = talk(model, "一", "/history", "/history 1", "二", "/adapter b", "三", "/history 0", "四")
    one, told, two, three, four = shown.split("\n")[1:6]
    assert told.startswith("/history N") and told.endswith(" 0") and asked[0] == "一" and asked[3] == "四"
    texts = [
        f"Human: 一\n\nAssistant: {one}</s>Human: 二\n\nAssistant: ",
        f"问：二\n答：{two}</s>问：三\n答：",
    ]
    for row, name, text in zip(asked[1:3], "ab", texts, strict=True):
        assert model.adapters[name].template.render(row, model.tokenizer) == text
    assert two == generate(asked[1], adapter="a", **greedy) and three == generate(asked[2], adapter="b", **greedy)
    assert four == generate("四", adapter="b", **greedy)


def test_history_is_rendered_as_in_an_exported_model(tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("user", " a\n"), ("assistant", "b"), ("user", "你好"))]
    for spec in ("default", "Q: {x}\nA: "):
        template, taught = Template(spec), copy.deepcopy(tokenizer)
        add_prompt_tokens(taught, template, 1)
        exported = taught.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        row = question("line 1", {"messages": messages}, template)
        assert exported == "<|softprompt_0|>" + template.render(row, tokenizer)


def test_a_chat_template_renders_messages(tokenizer):
    taught = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    taught.chat_template = turns + "{% if add_generation_prompt %}<bot>{% endif %}"
    messages = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    row = question("line 1", {"messages": messages}, Template("chat"))
    assert Template("chat").render(row, taught) == "<system>s</s><user>a</s><assistant>b</s><user>c</s><bot>"


def test_a_chat_survives_errors_and_ctrl_c(place, monkeypatch):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    generate = model.generate
    interrupted = iter([True])

    def stopped(*args, **kwargs):
        if next(interrupted, False):
            kwargs["on_text"]("半")
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", stopped)
    shown, _ = talk(model, "今天", KeyboardInterrupt, "/adapter nothing", "/adapter", "/jump", "/help", "今天")
    assert "半 …stopped" in shown and "error: adapter nothing" in shown
    assert "a, none, or a folder" in shown and "no such command: /jump" in shown
    assert shown.count("/quit") >= 2 and shown.rstrip("\n").endswith(
        generate("今天", do_sample=False, max_new_tokens=5)
    )


def test_infer_without_a_prompt_chats_on_a_terminal(place, capsys, monkeypatch):
    typist = Typist("今天", "/quit")
    monkeypatch.setattr("builtins.input", typist)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = run_infer(["--adapter", "a", *GREEDY], capsys, monkeypatch)
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    assert out.splitlines()[1] == model.generate("今天", do_sample=False, max_new_tokens=5)


@pytest.mark.slow
def test_arrow_keys_bring_lines_back_on_a_real_terminal(place):
    """In another process, behind a pseudo-terminal."""
    argv = [sys.executable, infer.__file__, "--adapter", "a", *GREEDY]
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="dumb", PYTHONPATH=str(Path(infer.__file__).parent))
        os.execv(argv[0], argv)
    shown = ""

    def until(number):
        nonlocal shown
        while shown.count("a> ") < number:
            shown += os.read(terminal, 1000).decode(errors="replace")

    until(1)
    for number, typed in ((2, b"hello\n"), (3, b"\x1b[A\n")):
        os.write(terminal, typed)
        until(number)
    os.write(terminal, b"/quit\n")
    with contextlib.suppress(OSError):  # the terminal is gone with the program
        while text := os.read(terminal, 1000):
            shown += text.decode(errors="replace")
    answer = softprompt.SoftPromptModel.from_pretrained(adapter="a").generate(
        "hello", do_sample=False, max_new_tokens=5
    )
    assert os.waitpid(child, 0)[1] == 0 and shown.count(answer) == 2, shown
