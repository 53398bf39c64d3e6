"""The conversation of infer.py: its commands, its memory, what interrupts it, and the terminal it is held on."""

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
from softprompt.export.chat_template import teach
from softprompt.generation.chat import Chat


class Typist:
    """Types lines, a Ctrl-C where one is asked for, and Ctrl-D at the end."""

    def __init__(self, *lines):
        self.lines, self.asked = list(lines), []

    def __call__(self, question):
        self.asked.append(question)
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


def test_a_conversation(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["first=a"])
    greedy = {"do_sample": False, "max_new_tokens": 5}
    shown, typist = talk(model, "今天", "/adapter b", "今天", "/base", "今天", "", "/adapter first", "/quit", "今天")
    answers = [model.generate("今天", adapter=name, **greedy) for name in ("first", "b", "none")]
    assert shown.split("\n")[1:] == [*answers, ""]
    assert typist.asked == ["first> ", "first> ", "b> ", "b> ", "none> ", "none> ", "none> ", "first> "]
    assert typist.lines == ["今天"]


def test_what_is_set_in_a_conversation(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    shown, _ = talk(
        model, "/set max_new_tokens 2", "今天", "/set temperature hot", "/set temperature 0", "/set", "/set beams 2"
    )
    lines = shown.split("\n")[1:]
    assert lines[0] == model.generate("今天", do_sample=False, max_new_tokens=2)
    assert lines[1] == "error: --temperature: invalid float value: 'hot'"
    assert lines[2] == "error: --temperature 0.0 must be above 0"
    assert "max_new_tokens=2" in lines[3] and "temperature=1.0" in lines[3]
    assert lines[4].startswith("error: unknown flag --beams")


def test_earlier_turns_stand_before_a_question(place):
    """As many as are asked for, in each adapter's template as training joined them; an answer that was stopped is none
    of them."""
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["a", "b"])
    greedy, asked = {"do_sample": False, "max_new_tokens": 5}, []
    generate = model.generate

    def noted(prompts, **given):
        asked.append(prompts)
        return generate(prompts, **given)

    model.generate = noted
    shown, _ = talk(model, "一", "/history", "/history 1", "二", "/adapter b", "三", "/history 0", "四")
    one, told, two, three, four = shown.split("\n")[1:6]
    assert told == "/history N, a number of earlier turns; it is 0" and asked[0] == "一" and asked[3] == "四"
    texts = [
        f"Human: 一\n\nAssistant: {one}</s>Human: 二\n\nAssistant: ",
        f"问：二\n答：{two}</s>问：三\n答：",
    ]
    for row, name, text in zip(asked[1:3], "ab", texts, strict=True):
        assert model.adapters[name].template.render(row, model.tokenizer) == text
    assert two == generate(asked[1], adapter="a", **greedy) and three == generate(asked[2], adapter="b", **greedy)
    assert four == generate("四", adapter="b", **greedy)


def test_a_conversation_is_rendered_as_an_exported_model_does(tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("user", " a\n"), ("assistant", "b"), ("user", "你好"))]
    for spec in ("default", "Q: {x}\nA: "):
        template, taught = Template(spec), copy.deepcopy(tokenizer)
        teach(taught, template, 1)
        exported = taught.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        row = question("line 1", {"messages": messages}, template)
        assert exported == "<|softprompt_0|>" + template.render(row, tokenizer)


def test_messages_are_a_question_for_a_chat_template_too(tokenizer):
    taught = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    taught.chat_template = turns + "{% if add_generation_prompt %}<bot>{% endif %}"
    messages = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    row = question("line 1", {"messages": messages}, Template("chat"))
    assert Template("chat").render(row, taught) == "<system>s</s><user>a</s><assistant>b</s><user>c</s><bot>"


def test_a_conversation_survives_mistakes_and_ctrl_c(place, monkeypatch):
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
    assert "半 …stopped" in shown and "error: adapter nothing: no such folder" in shown
    assert "/adapter NAME, one of a, none, or a folder" in shown and "no such command: /jump" in shown
    assert shown.count("/quit") >= 2 and shown.rstrip("\n").endswith(
        generate("今天", do_sample=False, max_new_tokens=5)
    )


def test_a_terminal_without_a_prompt_is_for_chat(place, capsys, monkeypatch):
    typist = Typist("今天", "/quit")
    monkeypatch.setattr("builtins.input", typist)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = run_infer(["--adapter", "a", *GREEDY], capsys, monkeypatch)
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    assert out.splitlines()[1] == model.generate("今天", do_sample=False, max_new_tokens=5)


@pytest.mark.slow
def test_on_a_real_terminal_arrow_keys_bring_lines_back(place):
    """In a process of its own, behind a pseudo-terminal."""
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
