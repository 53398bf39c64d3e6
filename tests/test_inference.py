"""infer.py: mixed adapters, files that go on where they stopped, choices, and side by side."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.peers import naive_loss
from helpers.programs import GREEDY, assert_line, jsonl, read_jsonl, refused, run_infer

import infer
import softprompt
from softprompt.cli import COMMANDS, run_command
from softprompt.config.command_line import parse_inference
from softprompt.data.template import Template
from softprompt.evaluation.confusion_matrix import ConfusionMatrix
from softprompt.generation.likelihood import answer_examples, log_likelihoods
from softprompt.generation.outputs import CallbackStreamer
from softprompt.generation.resumable_jsonl import ResumableJsonl
from softprompt.utils.errors import ConfigError, OutputError, SoftpromptError

PROMPTS = [
    {"prompt": "今天", "adapter": "first"},
    {"prompt": "hello", "adapter": "none"},
    {"prompt": "明天怎么样"},
    {"q": "酒店", "adapter": "b"},
    {"instruction": "说", "input": "好", "adapter": "first"},
]
MIXED = ["--adapter", "first=a", "--prompts_file", "p.jsonl", "--output_file", "out.jsonl"]


def test_each_line_of_a_file_may_name_its_adapter(place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    out = run_infer([*MIXED, *GREEDY], capsys, monkeypatch)
    lines = read_jsonl(place / "out.jsonl")
    model = softprompt.SoftPromptModel.from_pretrained(adapter={"first": "a", "b": "b"})
    questions = [{n: v for n, v in p.items() if n != "adapter"} for p in PROMPTS]
    expected = [
        model.generate(
            {n: v for n, v in p.items() if n != "adapter"}, adapter=p.get("adapter"), do_sample=False, max_new_tokens=5
        )
        for p in PROMPTS
    ]
    assert out == "" and [line.pop("text") for line in lines] == expected
    assert lines == [{"adapter": "first", **p} for p in PROMPTS]
    together = model.generate(
        questions,
        adapter=[p.get("adapter", "first") for p in PROMPTS],
        do_sample=False,
        max_new_tokens=5,
        batch_size=2,
    )
    assert together == expected


def test_no_default_adapter_is_looked_for_where_every_line_names_one(place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl({"prompt": "今天", "adapter": "a"}, {"prompt": "b", "adapter": "none"}))
    lines = run_infer(["--prompts_file", "p.jsonl", *GREEDY], capsys, monkeypatch).splitlines()
    assert [json.loads(line)["adapter"] for line in lines] == ["a", "none"]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3, 5])
@pytest.mark.parametrize("torn", ["", '{"prompt": "明', "\u660e"[:1]])
def test_the_same_command_goes_on_where_it_stopped(kept, torn, sampled, place, capsys, monkeypatch):
    """Without --seed, too: the samples that are yet to come are those of the run that was stopped."""
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    how = ["--max_new_tokens", "5", "--temperature", "3"] if sampled else GREEDY
    run_infer([*MIXED, *how], capsys, monkeypatch)
    whole = (place / "out.jsonl").read_bytes()
    cut = b"".join(whole.splitlines(keepends=True)[:kept]) + torn.encode()
    (place / "out.jsonl").write_bytes(cut)
    run_infer([*MIXED, *how, "--batch_size", "3"], capsys, monkeypatch)
    assert (place / "out.jsonl").read_bytes() == whole


def other_prompts(place: Path) -> None:
    (place / "p.jsonl").write_bytes(jsonl({"prompt": "昨天", "adapter": "first"}, *PROMPTS[1:]))


def fewer_prompts(place: Path) -> None:
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS[:4]))


def other_adapter(place: Path) -> None:
    write_adapter(
        place / "a",
        Path(json.loads((place / "a/adapter_config.json").read_text())["base_model_name_or_path"]),
        3,
        seed=9,
    )


def other_dtype(place: Path) -> None:
    note(place, dtype="torch.bfloat16")


def broken_line(place: Path) -> None:
    (place / "out.jsonl").write_bytes(b"{\n" + (place / "out.jsonl").read_bytes().split(b"\n", 1)[1])


def no_note(place: Path) -> None:
    (place / ".out.jsonl.run.json").unlink()


def other_tokenizer(place: Path) -> None:
    note(place, tokenizer="0" * 64)


def note(place: Path, **known: str) -> None:
    path = place / ".out.jsonl.run.json"
    found = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("tokenizer", "dtype")}
    path.write_text(json.dumps(found | known))


OTHER_RUNS = {
    other_prompts: "line 1: does not answer prompt 1; name another file, or give --overwrite_output_file",
    fewer_prompts: "holds 5 answers, but there are 4 prompts",
    other_adapter: "is from another run, with adapters",
    other_tokenizer: "is from another run, with tokenizer",
    other_dtype: "is from another run, with dtype",
    broken_line: "line 1: not JSON",
    no_note: "out.jsonl is not from a run of infer.py",
}


@pytest.mark.parametrize("change", OTHER_RUNS, ids=lambda f: f.__name__)
def test_an_output_file_from_another_run_is_refused(change, place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    run_infer([*MIXED, *GREEDY], capsys, monkeypatch)
    change(place)
    before = (place / "out.jsonl").read_bytes()
    argv = [*MIXED, *GREEDY]
    lines = refused(infer, argv, capsys, monkeypatch, place)
    assert_line(lines, OTHER_RUNS[change])
    assert (place / "out.jsonl").read_bytes() == before
    run_infer([*argv, "--overwrite_output_file"], capsys, monkeypatch)


@pytest.mark.parametrize("name", ["p.jsonl", "notes.txt", "a/adapter_config.json"])
def test_a_file_that_holds_no_answers_is_not_overwritten(name, place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    (place / "notes.txt").write_text("mine\n")
    argv = [*MIXED, *GREEDY, "--output_file", name, "--overwrite_output_file"]
    assert_line(refused(infer, argv, capsys, monkeypatch, place), f"--output_file {name}")


def test_answers_of_an_earlier_version_which_noted_less_go_on(place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    run_infer([*MIXED, *GREEDY], capsys, monkeypatch)
    whole = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    note(place)
    run_infer([*MIXED, *GREEDY], capsys, monkeypatch)
    assert (place / "out.jsonl").read_bytes() == whole


def test_other_settings_are_another_run(place, capsys, monkeypatch):
    (place / "p.jsonl").write_bytes(jsonl(*PROMPTS))
    run_infer([*MIXED, *GREEDY], capsys, monkeypatch)
    line = refused(infer, [*MIXED, *GREEDY, "--top_k", "3"], capsys, monkeypatch, place)
    assert_line(line, "is from another run, with top_k null")


def test_finished_answers_are_kept_when_a_run_breaks(tmp_path):
    asked = [{"prompt": str(n)} for n in range(3)]
    with pytest.raises(ZeroDivisionError), ResumableJsonl(str(tmp_path / "o.jsonl"), asked, {"seed": 1}) as file:
        file.write({"prompt": "0", "text": "a"})
        raise ZeroDivisionError
    assert ResumableJsonl(str(tmp_path / "o.jsonl"), asked, {"seed": 1}).done == 1
    with pytest.raises(OutputError, match="from another run, with seed 1"):
        ResumableJsonl(str(tmp_path / "o.jsonl"), asked, {"seed": 2})


# ruff: noqa: E501 (a table reads best with a case a line)
REFUSED = {
    "--adapter a --prompts_file unknown.jsonl": "unknown.jsonl, line 2: unknown adapter 'sentiment'; give one of a, none, or load its folder",
    "--prompts_file unknown.jsonl": "unknown.jsonl, line 2: unknown adapter 'sentiment'; give one of none, or load its folder",
    "--adapter a --prompts_file broken.jsonl": "broken.jsonl, line 2: not JSON",
    "--adapter a --prompts_file number.jsonl": "number.jsonl, line 1: adapter must be a folder, a name .* not 3",
    "--adapter a --prompts_file list.jsonl": r"list.jsonl, line 1: expected an object of columns, found a list",
    "--adapter a --prompts_file long.jsonl --max_length 40": r"long.jsonl, line 2: --max_length 40 .* prompt of \d+ tokens",
    "--adapter a --adapter other --prompt 好": "adapters are for several bases: a for .*, other for some/base; ask those of one base",
    "--adapter a --prompts_file far.jsonl": "far.jsonl, line 2: adapter other .* some/base.*--model_name_or_path",
    "--adapter a --adapter wide --prompt 好": "virtual tokens have size 16, but .* has hidden size 32",
    "--adapter a --adapter a --prompt 好": "--adapter a is given twice",
    "--adapter =a --prompt 好": "--adapter =a: expected FOLDER, name=FOLDER or none",
    "--adapter none=a --prompt 好": "--adapter none=a: expected FOLDER",
    "--adapter x=nothing --prompt 好": "adapter nothing: no such folder",
    "--adapter a": 'give either --prompt "…" or --prompts_file FILE or --eval_dataset FILE; without them, infer.py chats',
    "--adapter a --prompt 好 --output_file o.jsonl": "--output_file goes with --prompts_file",
    "--adapter a --prompts_file one.txt --output_file a": "--output_file a is a folder",
    "--adapter a --prompts_file a": "--prompts_file a is a folder; name a .txt or a .jsonl in it",
    "--adapter a --prompts_file gap.txt": "gap.txt, line 2: prompt is empty; write a question, or take the line out",
    "--adapter a --prompts_file said.jsonl": "said.jsonl, line 2: the roles of messages must alternate, begin with user and end with user, not user, assistant",
    "--adapter b --prompts_file said.jsonl": "said.jsonl, line 2: the roles of messages must alternate",
    "--adapter a --prompts_file mute.jsonl": "mute.jsonl, line 1: 'messages' must be a list of 1 or more",
    "--adapter gone --prompt 好": "base model '/nowhere/base': no such folder .looked for /nowhere/base.; give --model_name_or_path",
    "--adapter a --prompts_file one.txt --output_file one.txt/o": "one.txt is not a folder",
    "--adapter a --prompt 好 --choices 正面": "--choices 正面: expected two or more different answers",
    "--adapter a --prompt 好 --choices 正面,正面": "expected two or more different",
    "--adapter a --choices 正面,负面": "--choices goes with --prompt",
    "--adapter a --eval_dataset none.jsonl": "none.jsonl: no such file",
    "--adapter a --prompt 好 --num_return_sequences 2 --do_sample false": "needs --do_sample or --num_beams",
    "--adapter a --prompt 好 --num_beams 2 --num_return_sequences 3": "is above --num_beams 2",
    "--adapter a --prompt 好 --stop_strings=": "--stop_strings holds an empty text",
    "--adapter a --prompt 好 --suppress_tokens 1 x": "--suppress_tokens: invalid int value: 'x'",
    "--adapter a --prompt 好 --eos_token_id -1": "--eos_token_id",
    "--adapter a --prompt 好 --min_p 2": "--min_p 2.0 must lie between 0 and 1",
    "--adapter a --prompt 好 --engine quick": "--engine: invalid choice: 'quick'",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused(flags, place, tiny_base, capsys, monkeypatch):
    write_adapter(place / "other", Path("some/base"), 3)
    write_adapter(place / "wide", tiny_base, 3, hidden_size=16)
    (place / "unknown.jsonl").write_bytes(
        jsonl({"prompt": "a", "adapter": "a"}, {"prompt": "b", "adapter": "sentiment"})
    )
    (place / "far.jsonl").write_bytes(jsonl({"prompt": "a"}, {"prompt": "b", "adapter": "other"}))
    (place / "broken.jsonl").write_bytes(jsonl({"prompt": "a"}, '{"prompt": '))
    (place / "number.jsonl").write_bytes(jsonl({"prompt": "a", "adapter": 3}))
    (place / "list.jsonl").write_bytes(b"[1]")
    (place / "long.jsonl").write_bytes(jsonl({"prompt": "a"}, {"prompt": "很长" * 30}))
    (place / "one.txt").write_text("好")
    (place / "gap.txt").write_text("好\n \n好\n\n")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (place / "said.jsonl").write_bytes(jsonl({"messages": said[:1]}, {"messages": said}))
    (place / "mute.jsonl").write_bytes(jsonl({"messages": []}))
    write_adapter(place / "gone", Path("/nowhere/base"), 3)
    assert_line(refused(infer, flags.split(), capsys, monkeypatch, place), REFUSED[flags])


def test_several_samples(place, capsys, monkeypatch):
    how = [
        "--adapter",
        "a",
        "--num_return_sequences",
        "3",
        "--temperature",
        "3",
        "--seed",
        "1",
        "--max_new_tokens",
        "5",
    ]
    several = run_infer([*how, "--prompt", "你好"], capsys, monkeypatch)
    (place / "p.txt").write_text("你好\n再见", encoding="utf-8")
    lines = [json.loads(x) for x in run_infer([*how, "--prompts_file", "p.txt"], capsys, monkeypatch).splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "adapter", "texts"}] * 2
    assert len(set(lines[0]["texts"])) > 1 and several == "\n".join(lines[0]["texts"]) + "\n"


def test_a_streamed_answer_is_the_answer(place, capsys, monkeypatch):
    for flags in (
        GREEDY,
        ["--temperature", "2", "--seed", "3", "--max_new_tokens", "30"],
        [*GREEDY, "--num_beams", "2"],
    ):
        for engine in ("packed", "padded"):
            ask = ["--adapter", "a", "--prompt", "今天天气", "--engine", engine, *flags]
            outs = {run_infer([*ask, "--stream", how], capsys, monkeypatch) for how in ("true", "false")}
            assert len(outs) == 1
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    pieces = []
    text = model.generate("今天", on_text=pieces.append, do_sample=False, max_new_tokens=20)
    assert "".join(pieces) == text


def test_pieces_are_whole_characters(tokenizer):
    """The test's tokenizer spells most Chinese characters in three tokens, one for each byte."""
    for text in ("今天 天气很好。", "hello, Assistant: ok\n\n好  ", " a😀b 天", "ok", "  ", ""):
        shown = []
        pieces = CallbackStreamer(tokenizer, shown.append)
        for _ in range(2):
            for token in tokenizer(text)["input_ids"]:
                pieces.add(token)
            pieces.finish()
        assert "".join(shown) == 2 * text.strip() and not [piece for piece in shown if "\ufffd" in piece]
        assert len(text) < 8 or len(shown) > 4


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("adapter", ["a", "none"])
def test_likelihoods_are_those_of_rows_run_alone(adapter, engine, place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a", engine=engine)
    from helpers.peers import random_examples

    rows = random_examples(9, 14)
    rows = [*rows, rows[0]]
    prompt = model.prompt if adapter == "a" else None
    front = torch.zeros(0, 32) if prompt is None else prompt
    expected = [-naive_loss(model.base, front, [r]).item() * sum(x != -100 for x in r.labels) for r in rows]
    found = log_likelihoods(model.engine, [prompt, None, prompt], [rows[:4], [], rows[4:]])
    assert [score for scores in found for score in scores] == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert log_likelihoods(model.engine, [], []) == []


def test_choices(place, capsys, monkeypatch):
    """The probability is the answer's, its end included, over those of all choices."""
    model = softprompt.SoftPromptModel.from_pretrained(adapter={"a": "a", "b": "b"})
    choices = ["正面", "负面", "ok"]
    for name in ("a", "b", "none"):
        (verdict,) = model.classify(["这部电影"], choices, adapter=name)
        tuned = model.adapters.get(name)
        template = tuned.template if tuned else Template()
        text = model.tokenizer(template.render(template.row("这部电影"), model.tokenizer))["input_ids"]
        scores = []
        for choice in choices:
            end = model.tokenizer(choice + model.tokenizer.eos_token)["input_ids"]
            row = softprompt.data.tokenization.Example(text + end, [-100] * len(text) + end)
            front = tuned.prompt if tuned else torch.zeros(0, 32)
            scores.append(-naive_loss(model.base, front, [row]).double() * len(end))
        expected = torch.stack(scores).softmax(0).tolist()
        assert list(verdict.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert verdict.label == choices[expected.index(max(expected))] and verdict.probability == max(
            verdict.probabilities.values()
        )
    ask = ["--adapter", "a", "--choices", "正面,负面,ok"]
    label, probability = run_infer([*ask, "--prompt", "这部电影"], capsys, monkeypatch).split()
    spaced = ["--adapter", "a", "--choices", "正面, 负面 ，ok", "--prompt", "这部电影"]
    assert run_infer(spaced, capsys, monkeypatch).split() == [label, probability]
    (place / "p.jsonl").write_bytes(jsonl({"prompt": "这部电影"}, {"prompt": "这部电影", "adapter": "b"}))
    lines = [json.loads(x) for x in run_infer([*ask, "--prompts_file", "p.jsonl"], capsys, monkeypatch).splitlines()]
    assert lines[0]["text"] == label and float(probability) == pytest.approx(lines[0]["probability"], abs=1e-4)
    assert lines[1]["adapter"] == "b"


def test_an_answer_that_is_scored_has_its_end(tokenizer):
    """As in training; else a label would be at least as likely as any longer one that begins with it."""
    ((one, two),) = answer_examples([[9, 8]], [{"instruction": ""}], ["ok", "正面"], [Template()], tokenizer)
    assert one.input_ids == [9, 8, *tokenizer("ok")["input_ids"], tokenizer.eos_token_id]
    assert two.labels == [-100, -100, *tokenizer("正面")["input_ids"], tokenizer.eos_token_id]


def test_side_by_side(place, capsys, monkeypatch):
    rows = [{"instruction": f"第{n}", "q": f"第{n}", "output": "正面" if n % 3 else "负面"} for n in range(6)]
    (place / "rows.jsonl").write_bytes(jsonl(*rows))
    argv = ["--adapter", "x=a", "--adapter", "b", "--adapter", "none", "--eval_dataset", "rows.jsonl"]
    out = run_infer(argv, capsys, monkeypatch)
    head, _, *figures = out.splitlines()
    assert head.split() == ["x", "b", "none"]
    of_metric = {line[:28].strip(): line[28:].split() for line in figures[: figures.index("")]}
    names = {"loss", "perplexity", "exact match", "accuracy (most likely label)", "macro F1"}
    assert names < of_metric.keys() and all(len(of_metric[name]) == 3 for name in of_metric if name in names)
    assert all(f"\n{name}:\n" in out for name in ("x", "b", "none")) and "expected \\ predicted" in out
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    right = sum(
        v.label == r["output"]
        for v, r in zip(model.classify([r["instruction"] for r in rows], ["正面", "负面"]), rows, strict=True)
    )
    assert of_metric["accuracy (most likely label)"][0] == f"{right / 6:.1%}"
    assert "always answering 正面 has an accuracy of 66.7%" in out and "too few to tell" in out


def test_figures_of_a_confusion():
    counts = {("a", "a"): 3, ("a", "b"): 1, ("b", "a"): 2, ("c", "b"): 1}
    confusion = ConfusionMatrix(["a", "b", "c"], counts)
    assert confusion.accuracy == pytest.approx(3 / 7)
    assert confusion.macro_f1 == pytest.approx((2 * 3 / (4 + 5) + 0 + 0) / 3)
    assert confusion.text_rows[1:] == [
        ["a", "3", "1", "0"],
        ["b", "2", "0", "0"],
        ["c", "0", "1", "0"],
    ]


def test_a_base_is_one_however_its_folder_is_spelt(place, tiny_base, capsys, monkeypatch):
    write_adapter(place / "c", tiny_base.parent / "." / ".." / tiny_base.parent.name / tiny_base.name, 2)
    (place / "link").symlink_to(tiny_base)
    write_adapter(place / "d", place / "link", 4)
    (place / "p.jsonl").write_bytes(jsonl({"prompt": "好"}, {"prompt": "好", "adapter": "d"}))
    out = run_infer(["--adapter", "a", "--adapter", "c", "--prompts_file", "p.jsonl", *GREEDY], capsys, monkeypatch)
    assert len(out.splitlines()) >= 2
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["a", "c"])
    model.load_adapter("d")
    assert "warning" not in capsys.readouterr().err


def test_adapters_from_python(place, tiny_base):
    model = softprompt.SoftPromptModel.from_pretrained(str(tiny_base), {"x": "a"})
    assert model.load_adapter("b", "y") == "y" and model.active_adapter == "x"
    model.set_adapter("y")
    greedy = {"do_sample": False, "max_new_tokens": 4}
    assert model.generate("今天", **greedy) == model.generate("今天", adapter="y", **greedy)
    with pytest.raises(SoftpromptError, match="question 2: unknown adapter 'z'; give one of x, y, none, or load"):
        model.generate(["a", "b"], adapter=["x", "z"])
    with pytest.raises(ConfigError, match="1 adapter names for 2 questions"):
        model.generate(["a", "b"], adapter=["x"])


def test_flags_of_several_values():
    argv = ["--adapter", "a", "--adapter", "n=b", "--stop_strings", "x", "y", "--suppress_tokens=3", "--prompt", "p"]
    config = parse_inference(argv)
    assert config.model.adapter == ["a", "n=b"] and config.generation.stop_strings == ["x", "y"]
    assert config.generation.suppress_tokens == [3]


def test_two_processes_do_not_write_one_output_file(tmp_path):
    asked, path = [{"prompt": "a"}, {"prompt": "b"}], str(tmp_path / "o.jsonl")
    first, late = ResumableJsonl(path, asked, {"seed": 1}), ResumableJsonl(path, asked, {"seed": 1})
    with first as file:
        file.write({**asked[0], "text": "x"})
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="is writing"):
                ResumableJsonl(path, asked, {"seed": 1}, overwrite)
        with pytest.raises(OutputError, match="is writing"), late:
            pass
    with pytest.raises(OutputError, match="another process has written there"), late:
        pass
    with ResumableJsonl(path, asked, {"seed": 1}) as file:
        assert file.done == 1


def test_the_command_chat_holds_a_conversation(place, capsys, monkeypatch):
    typed = iter(["今天", "/quit"])
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as ended:
        run_command(COMMANDS["chat"].run, ["--adapter", "a", *GREEDY], prints_answers=True)
    out, err = capsys.readouterr()
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    assert ended.value.code == 0 and model.description in err
    assert out.splitlines()[2] == model.generate("今天", do_sample=False, max_new_tokens=5)
