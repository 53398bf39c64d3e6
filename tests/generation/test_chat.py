"""The chat of infer.py without its terminal: commands, settings, turns, errors and Ctrl-C."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.adapters import write_adapter
from helpers.programs import GREEDY, run_infer
from helpers.small_bases import ON_DECODERS

import softprompt
from softprompt.data.dataset import question
from softprompt.data.template import Template
from softprompt.export.chat_template import add_prompt_tokens
from softprompt.generation.chat.commands import COMMANDS, completions, run_command
from softprompt.generation.chat.loop import hold_chat, prompt_of
from softprompt.generation.chat.messages import parse_message
from softprompt.generation.chat.session import ChatSession

SHORT = {"do_sample": False, "max_new_tokens": 5}
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT_TEMPLATE = TURNS + "{% if add_generation_prompt %}<bot>{% endif %}"


class Typist:
    """A terminal whose user types the lines, a Ctrl-C for KeyboardInterrupt, and Ctrl-D at the end."""

    keys = "keys of this terminal"

    def __init__(self, *lines):
        self.lines, self.prompts, self.remembered = list(lines), [], []

    def read(self, prompt):
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def remember(self, message):
        self.remembered.append(message)


def load(*adapters):
    return softprompt.SoftPromptModel.from_pretrained(adapter=list(adapters))


def session(*adapters, **given):
    return ChatSession(load(*adapters), {**SHORT, **given})


def talk(model, *lines, **given):
    """What is displayed behind the first two lines, which say how to begin, and the typist."""
    typist, shown = Typist(*lines), []
    hold_chat(ChatSession(model, {**SHORT, **given}), typist, shown.append, True, str)
    return "".join(shown).split("\n", 2)[2], typist


def run(chat, line):
    return run_command(chat, parse_message(line))


def asked_by(model):
    """The questions that the model gets from now on, as text in their adapters' templates."""
    asked, generate = [], model.generate

    def recorded(row, **given):
        asked.append(model.adapters[given["adapter"]].template.render(row, model.tokenizer))
        return generate(row, **given)

    model.generate = recorded
    return asked


@pytest.fixture
def conversing(place, base_folder):
    """An adapter `c` with the template `chat`, and `a` without it, on a base that has a chat template."""
    base = shutil.copytree(base_folder, place / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_adapter(place / "a", base, 3, seed=1)
    write_adapter(place / "c", base, 3, "chat", seed=3)
    return place


@ON_DECODERS
def test_each_line_is_answered_by_the_current_adapter(place):
    model = load("first=a")
    shown, typist = talk(model, "今天", "/adapter b", "今天", "/base", "今天", "", "/adapter first", "/quit", "今天")
    answers = [model.generate("今天", adapter=name, **SHORT) for name in ("first", "b", "none")]
    assert shown.split("\n")[::2] == [*answers, ""]
    assert typist.prompts == ["first> ", "first> ", "b> ", "b> ", "none> ", "none> ", "none> ", "first> "]
    assert typist.lines == ["今天"] and typist.remembered[:2] == ["今天", "/adapter b"]


@pytest.mark.parametrize("leaving", ["/exit", "/bye", "/quit", "exit", "quit", "/EXIT"])
def test_words_that_leave(leaving, place):
    shown, typist = talk(load("a"), leaving, "今天")
    assert shown == "" and typist.lines == ["今天"]


def test_what_only_looks_like_a_command_is_a_question(place):
    model = load("a")
    asked = asked_by(model)
    talk(model, "/etc/hosts", "// x", '"""/exit"""', '"""', "exit", "", ' zwei"""')
    assert [text.removeprefix("Human: ").partition("\n\nAss")[0] for text in asked] == [
        "/etc/hosts",
        "// x",
        "/exit",
        "exit\n\n zwei",
    ]


def test_settings_of_a_chat(place):
    model = load("a")
    shown, _ = talk(
        model, "/set max_new_tokens 2", "今天", "/set temperature hot", "/set temperature 0", "/set beams 2"
    )
    set_to, answer, *errors = shown.split("\n")
    assert set_to == "max_new_tokens 2" and answer == model.generate("今天", do_sample=False, max_new_tokens=2)
    assert errors[0].startswith("error: --temperature") and "'hot'" in errors[0]
    assert errors[1].startswith("error: --temperature 0.0")
    assert errors[2].startswith("error:") and "num_beams" in errors[2]


def test_all_settings_are_listed_one_per_line(place):
    chat = session("a", seed=3)
    lines = dict(line.split(None, 1) for line in run(chat, "/set").splitlines())
    assert lines["max_new_tokens"] == "5" and lines["do_sample"] == "false" and lines["seed"] == "3"
    assert lines["batch_size"] == "8" and lines["temperature"] == "1.0" and lines["min_p"] == "auto"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set seed 7", "seed", 7),
        ("/set max-length=99", "max_length", 99),
        ("/set do_sample auto", "do_sample", True),
        ("/set stop_strings 'a b' c", "stop_strings", ("a b", "c")),
        ("/set stop_strings don't", "stop_strings", ("don't",)),
        ("/set suppress_tokens 3 4", "suppress_tokens", (3, 4)),
    ],
)
def test_a_setting_takes_what_its_flag_takes(line, name, value, place):
    chat = session("a")
    shown = run(chat, line)
    assert getattr(chat.settings, name) == value and shown.startswith(f"{name} ")
    assert run(chat, f"/set {name}") == shown


@pytest.mark.parametrize("line", ["/set seed -1", "/set batch_size 0", "/set top_p 2", "/set num_return_sequences 3"])
def test_a_wrong_value_is_refused_at_once(line, place):
    chat = session("a")
    with pytest.raises(softprompt.errors.ConfigError, match=line.split()[1]):
        run(chat, line)
    assert chat.given == SHORT


def test_settings_of_a_call_are_checked_and_returned(place):
    model = load("a")
    settings = model.settings(seed=3, batch_size=2, temperature=0.5)
    assert (settings.seed, settings.batch_size, settings.temperature) == (3, 2, 0.5)
    for wrong in ({"seed": -1}, {"batch_size": 0}):
        with pytest.raises(softprompt.errors.ConfigError, match=next(iter(wrong))):
            model.settings(**wrong)


@ON_DECODERS
def test_history_puts_earlier_turns_before_a_question(place):
    """As many turns as /history says, joined as in training, in the template of the adapter that answers."""
    model = load("a", "b")
    asked = asked_by(model)
    shown, _ = talk(model, "一", "/history", "/history 1", "二", "/adapter b", "三", "/history 0", "四", "/history x")
    one, told, _, two, _, _, _, _, error = shown.split("\n")[:9]
    assert "by itself" in told and error.startswith("error: /history x")
    assert asked == [
        "Human: 一\n\nAssistant: ",
        f"Human: 一\n\nAssistant: {one}</s>Human: 二\n\nAssistant: ",
        f"问：二\n答：{two}</s>问：三\n答：",
        "问：四\n答：",
    ]


@ON_DECODERS
def test_a_conversation_goes_on_where_the_template_is_made_for_it(conversing):
    model = load("c")
    asked = asked_by(model)
    shown, _ = talk(model, "一", "二", "/clear", "三", "/history 0", "四", "/history auto", "五")
    one, _, _, three, _, four, *_ = shown.split("\n")
    assert asked == [
        "<user>一</s><bot>",
        f"<user>一</s><assistant>{one}</s><user>二</s><bot>",
        "<user>三</s><bot>",
        "<user>四</s><bot>",
        f"<user>三</s><assistant>{three}</s><user>四</s><assistant>{four}</s><user>五</s><bot>",
    ]


def test_turns_that_leave_no_room_for_an_answer_are_left_out(conversing):
    model = load("c")
    asked = asked_by(model)
    long = "很" * 20
    shown, _ = talk(model, long, long, "好", "/set max_new_tokens 3", "好", max_new_tokens=None, max_length=120)
    assert asked[1].count("<user>") == 1 and "/set max_length" in shown
    assert asked[-1].count("<user>") == 4 and shown.count("left out") == 1


def test_the_input_of_a_question(place, conversing):
    write_adapter(place / "d", place / "base", 3, "Q: {q} C: {c} A: ", seed=4)
    model = load("a", "c", "d")
    asked = asked_by(model)
    talk(
        model,
        *("/input 你好", "翻译", "/history 1", "又", "/input", "三", "/history 0"),
        *("/adapter c", "/input 'x'", "问", "/adapter d", '/input """', "y", 'z"""', "问", '/input ""', "问"),
    )
    head, answer = asked[1].split("Human: 又")
    assert asked[0] == "Human: 翻译\n你好\n\nAssistant: " and head.startswith(asked[0])
    assert answer == "\n你好\n\nAssistant: " and asked[2].endswith("Human: 三\n\nAssistant: ")
    assert asked[3:] == ["<user>问\nx</s><bot>", "Q: 问 C: y\nz A: ", "Q: 问 C:  A: "]


def test_a_template_without_a_second_column_takes_no_input(place):
    chat = session("b")
    with pytest.raises(softprompt.errors.ConfigError, match="no column"):
        run(chat, "/input x")
    assert chat.input is None
    write_adapter(
        place / "d", json.loads((place / "a/adapter_config.json").read_text())["base_model_name_or_path"], 3, "{q} {c}"
    )
    shown, _ = talk(load("d"), "问")
    assert "c would be empty" in shown and "/input" in shown


@ON_DECODERS
def test_the_most_likely_of_given_choices(place):
    model = load("a")
    shown, _ = talk(model, "/choices 正面，负面", "好", "/history 1", "坏", "/choices", "好", "/choices 正面")
    _, first, _, second, told, _, error, _ = shown.split("\n")
    found = model.classify(["好"], ["正面", "负面"])[0]
    (label, percent), other = first.split("   ")[0].split(), first.split("   ")[1]
    assert label == found.label and percent == f"{found.probability:.1%}" and other.split()[0] != label
    row = {"messages": [{"role": r, "content": c} for r, c in (("user", "好"), ("assistant", label), ("user", "坏"))]}
    assert second.startswith(model.classify([row], ["正面", "负面"])[0].label)
    assert told == "Answers are generated." and error.startswith("error: --choices 正面")


@pytest.mark.parametrize("named", ["my run", "'my run'", '"my run"', "./my run/", "x=my run"])
def test_the_name_of_a_folder_may_have_spaces(named, place):
    shutil.move("b", "my run")
    chat = session("a")
    run(chat, f"/adapter {named}")
    assert prompt_of(chat) == ("x" if "=" in named else "my run") and len(chat.model.adapters) == 2
    run(chat, "/adapter a")
    run(chat, "/adapter x" if "=" in named else "/adapter .//my run")
    assert len(chat.model.adapters) == 2 and chat.adapter != "a"


def test_adapters_under_runs_are_listed_and_found_by_their_names(place):
    Path("runs/two").mkdir(parents=True)
    shutil.move("a", "runs/one")
    shutil.copytree("b", "runs/two/checkpoint-5")
    shutil.copytree("b", "runs/two/checkpoint-12", copy_function=shutil.copy)  # is newer
    shutil.copytree("b", "runs/broken")
    Path("runs/broken/adapter_config.json").write_text("{")
    chat = session("runs/one", "b")
    listed = {line[2:].split("  ")[0]: line for line in run(chat, "/adapters").splitlines()}
    assert set(listed) == {"runs/one", "b", "runs/two/checkpoint-12", "runs/broken", "none"}
    assert listed["runs/one"].startswith("* ") and "3 virtual tokens" in listed["runs/one"]
    assert "cannot be read" in listed["runs/broken"]
    run(chat, "/adapter two/checkpoint-12")
    assert chat.adapter == "runs/two/checkpoint-12" and prompt_of(chat) == "two/checkpoint-12"
    run(chat, "/adapter one")
    assert chat.adapter == "runs/one" and prompt_of(chat) == "one"
    assert [line for line in run(chat, "/adapter").splitlines() if line.startswith("*")] == [listed["runs/one"]]


def test_the_prompt_is_short_and_tells_adapters_apart(place):
    for folder in ("x/same", "y/same", "一" * 40):
        shutil.copytree("a", folder)
    assert [prompt_of(session(*names)) for names in (["x/same"], ["x/same", "y/same"])] == ["same", "x/same"]
    assert len(prompt_of(session("一" * 40))) <= 32


def test_completion(place):
    Path("my runs/deep").mkdir(parents=True)
    shutil.copytree("b", "runs/three")
    chat = session("first=a")
    assert completions(chat, "/cho") == ["/choices"] and completions(chat, "") == completions(chat, "好") == []
    assert completions(chat, "/ex") == ["/exit"] and set(completions(chat, "/")) >= {*COMMANDS, "/bye"}
    assert completions(chat, "/adapter f") == ["/adapter first"]
    assert completions(chat, "/adapter my") == ["/adapter my runs/"]
    assert completions(chat, "/adapter my runs/") == ["/adapter my runs/deep/"]
    assert completions(chat, "/adapter runs/t")[0] == "/adapter runs/three"
    assert completions(chat, "/set te") == ["/set temperature"]
    assert completions(chat, "/set do_sample f") == ["/set do_sample false"]
    assert completions(chat, "/set top_k 1") == completions(chat, "/nothing x") == []


def test_help_names_every_command_and_the_keys(place):
    shown, _ = talk(load("a"), "/?", "/help")
    first, second = shown[: len(shown) // 2], shown[len(shown) // 2 :]
    assert first == second and Typist.keys in first and all(f"\n{name}" in f"\n{first}" for name in COMMANDS)


def test_a_chat_survives_errors_and_ctrl_c(place, monkeypatch):
    """Also an error that nobody expects, and one in the middle of an answer."""
    model = load("a")
    generate, failures = model.generate, iter([KeyboardInterrupt(), ValueError("one\ntwo"), OSError("three")])

    def fails(*args, **kwargs):
        if failure := next(failures, None):
            kwargs["on_text"]("半\x1b[31m")
            raise failure
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", fails)
    lines = [
        "今天",
        "今天",
        "今天",
        KeyboardInterrupt,
        "/adapter nothing",
        f"/adapter {'x' * 300}",
        "/jump",
        "/choice x",
    ]
    shown, typist = talk(model, *lines, "今天")
    stopped, hint, *errors, answer, _ = shown.split("\n")
    assert stopped == errors[0] == errors[2] == r"半\x1b[31m" and hint.startswith("(stopped)") and "/exit" in hint
    assert errors[1] == "error: one two" and errors[3] == "error: three" and errors[4] == "(Ctrl-D or /exit leaves)"
    assert all(error.startswith("error: ") for error in errors[5:]) and len(errors) == 9
    assert "nothing" in errors[5] and "/jump" in errors[7] and "/choices" in errors[8]
    assert answer == generate("今天", **SHORT) and not typist.lines


@ON_DECODERS
def test_an_answer_that_was_stopped_leaves_no_trace(place):
    model, pieces = load("a"), []
    chat = ChatSession(model, {"do_sample": False, "max_new_tokens": 20})

    def write(text):
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer("今天", write)
    shown = []
    chat.answer("今天", shown.append)
    assert "".join(shown).strip() == load("a").generate("今天", do_sample=False, max_new_tokens=20)
    assert len(chat.turns) == 1


def test_bytes_that_are_not_text_are_refused(place):
    shown, _ = talk(load("a"), "caf\udce9")
    assert shown.startswith("error: ") and "encoding" in shown


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
    taught.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    row = question("line 1", {"messages": messages}, Template("chat"))
    assert Template("chat").render(row, taught) == "<system>s</s><user>a</s><assistant>b</s><user>c</s><bot>"


def test_infer_without_a_prompt_chats_on_a_terminal(place, capsys, monkeypatch):
    typist = Typist("今天", "/quit")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("builtins.input", typist.read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = run_infer(["--adapter", "a", *GREEDY], capsys, monkeypatch)
    assert out.splitlines()[2] == load("a").generate("今天", **SHORT)
