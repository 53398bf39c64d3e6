"""Ensembles: votes and mean likelihoods beside naive references, in Python, in infer.py and in evaluation."""

import itertools
import json
import math

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.peers import naive_loss
from helpers.programs import GREEDY, assert_line, jsonl, read_jsonl, refused, run_infer
from helpers.small_bases import ON_DECODERS

import infer
import softprompt
from softprompt.data.tokenization import Example
from softprompt.evaluation.evaluator import Evaluator
from softprompt.generation.likelihood import ChoiceResult
from softprompt.generation.voting import vote_answer, vote_choice
from softprompt.utils.errors import AdapterError, ConfigError

QUESTIONS = ["今天", "hello", "明天怎么样", "这部电影"]
VOTINGS = ("majority_vote", "mean_likelihood")


@pytest.fixture
def place(base_folder, tmp_path, monkeypatch):
    """Five prompts of different lengths; two are equal, and one has another template."""
    for number, seed in enumerate((1, 2, 2, 3)):
        write_adapter(tmp_path / f"p{number}", base_folder, 3 + seed, seed=seed)
    write_adapter(tmp_path / "other", base_folder, 2, "问：{q}\\n答：", seed=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = ["p0", "p1", "p2", "p3", "other"]


def naive_scores(model, name, question, answers):
    """Log-likelihood of each answer with its end token, row by row through the base's own forward."""
    adapter, scores = model.adapters[name], []
    text = adapter.template.render(adapter.template.row(question), model.tokenizer)
    ids = model.tokenizer(text)["input_ids"]
    for answer in answers:
        end = model.tokenizer(answer + model.tokenizer.eos_token)["input_ids"]
        row = Example(ids + end, [-100] * len(ids) + end)
        scores.append(-naive_loss(model.base, adapter.prompt, [row]).item() * len(end))
    return scores


def naive_shares(model, names, question, answers):
    """Mean over the members of exp(score) / Σ exp(score), for each answer."""
    of_members = []
    for name in names:
        powers = [math.exp(score) for score in naive_scores(model, name, question, answers)]
        of_members.append([power / sum(powers) for power in powers])
    return [sum(shares) / len(names) for shares in zip(*of_members, strict=True)]


def naive_winner(model, names, question, answers, voting):
    """The answer that wins among those of the members."""
    left = list(dict.fromkeys(answers))
    if voting == "majority_vote":
        left = [a for a in left if answers.count(a) == max(map(answers.count, answers))]
    shares = naive_shares(model, names, question, left)
    return left[shares.index(max(shares))]


@ON_DECODERS
def test_log_likelihoods_are_those_of_rows_run_alone(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in NAMES})
    answers = ["正面", "ok", "负面 hello"]
    found = model.log_likelihoods(QUESTIONS, answers, adapter=["p0", "other", "p0", "p3"])
    for question, name, scores in zip(QUESTIONS, ["p0", "other", "p0", "p3"], found, strict=True):
        assert scores == pytest.approx(naive_scores(model, name, question, answers), abs=1e-5 * 30)
    assert model.log_likelihoods(["a"], []) == [[]] and model.log_likelihoods([], ["a"]) == []


@pytest.mark.parametrize(
    ("names", "base_folder"),
    [
        *((names, "bloom") for names in (NAMES, NAMES[:3], ["p0", "p3"], ["p1", "p2"])),
        *((NAMES, kind) for kind in ("llama", "gemma3_text")),
    ],
    indirect=["base_folder"],
)
@pytest.mark.parametrize("voting", VOTINGS)
def test_an_ensemble_answers_with_the_winner_among_its_members_answers(names, voting, place):
    """The questions include ties and clear votes."""
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in NAMES})
    greedy = {"do_sample": False, "max_new_tokens": 3}
    each = {name: model.generate(QUESTIONS, adapter=name, **greedy) for name in names}
    expected = [
        naive_winner(model, names, question, [each[name][at] for name in names], voting)
        for at, question in enumerate(QUESTIONS)
    ]
    assert model.ensemble(names, voting).generate(QUESTIONS, **greedy) == expected
    assert model.ensemble(names, voting).generate(QUESTIONS[0], **greedy) == expected[0]
    assert list(model.ensemble(names, voting).stream(QUESTIONS, skip=3, batch_size=2, **greedy)) == expected[3:]


@ON_DECODERS
@pytest.mark.parametrize("voting", VOTINGS)
def test_an_ensemble_classifies_by_its_members_probabilities(voting, place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in NAMES})
    choices = ["正面", "负面", "ok"]
    for question, result in zip(QUESTIONS, model.ensemble(NAMES, voting).classify(QUESTIONS, choices), strict=True):
        shares = naive_shares(model, NAMES, question, choices)
        assert list(result.probabilities.values()) == pytest.approx(shares, abs=1e-5)
        labels = [model.classify([question], choices, adapter=name)[0].label for name in NAMES]
        left = [c for c in choices if voting != "majority_vote" or labels.count(c) == max(map(labels.count, labels))]
        assert result.label == max(left, key=lambda c: shares[choices.index(c)])
        assert result.probability == result.probabilities[result.label]


def must_not_be_called(answers):
    raise AssertionError("a clear vote needs no scores")


def test_votes():
    assert vote_answer(["a", "b", "b"], "majority_vote", must_not_be_called) == "b"
    assert vote_answer(["a", "a"], "mean_likelihood", must_not_be_called) == "a"
    # for two of three members a is slightly likelier than b, for the third b is far likelier
    scores = {"a": [-1.0, -1.0, -9.0], "b": [-1.1, -1.1, -0.1], "c": [-0.5, -0.5, -0.5]}

    def of(answers):
        return [[scores[answer][member] for answer in answers] for member in range(3)]

    assert vote_answer(["a", "b", "a", "b", "c"], "majority_vote", of) == "b"
    assert vote_answer(["a", "b", "c"], "mean_likelihood", of) == "c"
    assert vote_answer(["b", "a"], "majority_vote", lambda answers: [[-1.0] * len(answers)] * 3) == "b"
    a, b = ChoiceResult("x", {"x": 0.6, "y": 0.4}), ChoiceResult("y", {"x": 0.0, "y": 1.0})
    assert vote_choice([a, b, a], "majority_vote") == ChoiceResult(
        "x", {"x": pytest.approx(0.4), "y": pytest.approx(0.6)}
    )
    assert vote_choice([a, b, a], "mean_likelihood").label == "y"
    assert vote_choice([a, b], "majority_vote").label == "y"


@ON_DECODERS
def test_members_answer_in_one_mixed_batch(place, monkeypatch):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in NAMES})
    batches, generate = [], model.generator.generate
    monkeypatch.setattr(
        model.generator, "generate", lambda requests, *rest: batches.append(len(requests)) or generate(requests, *rest)
    )
    model.ensemble().generate(QUESTIONS, do_sample=False, max_new_tokens=2)
    assert batches == [len(QUESTIONS) * len(NAMES)] and str(model.generator) == "packed engine"


@ON_DECODERS
def test_every_sample_has_a_vote(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={"a": "p0", "b": "p3"})
    how = {"temperature": 0.5, "max_new_tokens": 1, "num_return_sequences": 5, "seed": 3}
    given = model.generate(["今天", "今天"], adapter=["a", "b"], **how)
    texts = list(itertools.chain(*given))
    assert model.ensemble().generate("今天", **how) == naive_winner(model, ["a", "b"], "今天", texts, "majority_vote")


ALL = [flag for name in NAMES[:4] for flag in ("--adapter", name)]


@ON_DECODERS
def test_on_the_command_line(place, capsys, monkeypatch):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in NAMES[:4]})
    expected = model.ensemble().generate(QUESTIONS, do_sample=False, max_new_tokens=5)
    (place / "p.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    ask = [*ALL, "--ensemble", *GREEDY]
    assert run_infer([*ask, "--prompt", QUESTIONS[0], "--stream"], capsys, monkeypatch) == expected[0] + "\n"
    into = [*ask, "--prompts_file", "p.txt", "--output_file", "o.jsonl"]
    run_infer(into, capsys, monkeypatch)
    whole = (place / "o.jsonl").read_bytes()
    assert [(line["adapter"], line["text"]) for line in read_jsonl(place / "o.jsonl")] == [
        (NAMES[:4], text) for text in expected
    ]
    (place / "o.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"prom')
    run_infer(into, capsys, monkeypatch)
    assert (place / "o.jsonl").read_bytes() == whole
    line = refused(infer, [*into, "--voting", "mean_likelihood"], capsys, monkeypatch, place)
    assert_line(line, 'is from another run, with ensemble "default"')
    choices = ["--choices", "正面, 负面"]
    (result,) = model.ensemble().classify([QUESTIONS[0]], ["正面", "负面"])
    label, probability = run_infer([*ask, *choices, "--prompt", QUESTIONS[0]], capsys, monkeypatch).split()
    assert label == result.label and float(probability) == pytest.approx(result.probability, abs=1e-4)
    found = run_infer([*ask, *choices, "--prompts_file", "p.txt"], capsys, monkeypatch).splitlines()
    assert [json.loads(line)["text"] for line in found] == [
        one.label for one in model.ensemble().classify(QUESTIONS, ["正面", "负面"])
    ]


@pytest.mark.parametrize("voting", [None, *VOTINGS])
def test_in_evaluation(voting, place, capsys, monkeypatch):
    names = ["p0", "p1", "p3"]
    model = softprompt.SoftPromptModel.from_pretrained(adapter={name: name for name in names})
    labels = ["正面", "负面"]
    rows = [{"instruction": text, "output": labels[n % 2]} for n, text in enumerate(QUESTIONS)]
    rows.append({"instruction": QUESTIONS[0], "output": "ok"})
    given = {
        4: ["负面", "ok", "正面", "负面", "ok"],
        5: ["正面", "ok", "ok", "", "ok"],
        6: ["负面", "负面", "正面", "x", "y"],
    }
    monkeypatch.setattr(Evaluator, "_answers", lambda self, generator, prompt: given[len(prompt)])
    (place / "rows.jsonl").write_bytes(jsonl(*rows))
    how = [*ALL, "--ensemble", "--eval_dataset", "rows.jsonl", "--choices", "正面,负面"]
    out = run_infer([*how[2:4], *how[:2], *how[6:], *(["--voting", voting] if voting else [])], capsys, monkeypatch)
    lines = {line[:29].strip(): line.split()[-1] for line in out.split("\n\n")[0].splitlines()}
    assert out.split("\n")[0].split() == ["p1", "p0", "p3", "ensemble", "of", "3"]
    total, targets = 0.0, 0
    for row in rows:
        answer = row["output"]
        scores = [naive_scores(model, name, row["instruction"], [answer])[0] for name in names]
        total -= math.log(sum(map(math.exp, scores)) / len(scores))
        targets += len(model.tokenizer(answer + model.tokenizer.eos_token)["input_ids"])
    assert float(lines["loss"]) == pytest.approx(total / targets, abs=1e-4)
    order = ["p1", "p0", "p3"]
    right = 0
    for at, row in enumerate(rows):
        of_members = [given[len(model.adapters[name].prompt)][at] for name in order]
        right += naive_winner(model, order, row["instruction"], of_members, voting or "majority_vote") == row["output"]
    assert right and lines["exact match"] == f"{right / len(rows):.1%}"
    taken = model.ensemble(order, voting).classify([row["instruction"] for row in rows], labels)
    right = sum(a.label == row["output"] for a, row in zip(taken, rows, strict=True))
    assert lines["accuracy (most likely label)"] == f"{right / len(rows):.1%}"
    assert "1 of 5 rows have an answer that is none of the choices" in out


# ruff: noqa: E501 (a table reads best with a case a line)
REFUSED = {
    "--prompt 好 --ensemble": "--ensemble needs two or more --adapter",
    "--adapter p0 --prompt 好 --ensemble": "--ensemble needs two or more --adapter",
    "--adapter p0 --adapter p1 --ensemble": "--ensemble goes with --prompt, --prompts_file or --eval_dataset",
    "--adapter p0 --adapter p1 --prompt 好 --voting majority_vote": "--voting goes with --ensemble",
    "--adapter p0 --adapter p1 --prompt 好 --ensemble --voting loud": "--voting: invalid choice: 'loud'",
    "--adapter p0 --adapter stray --prompt 好 --ensemble": "adapters are for several bases: p0 for .*, stray for some/base; ask those of one base at a time",
    "--adapter p0 --adapter wide --prompt 好 --ensemble": "virtual tokens have size 16, but .* has hidden size 32",
    "--adapter p0 --adapter p1 --ensemble --prompts_file own.jsonl": "own.jsonl, line 2: names an adapter, but --ensemble",
    "--adapter p0 --adapter long --ensemble --eval_dataset rows.jsonl --max_length 66": "--max_length 66, the adapters' templates truncate different answers",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_flags(flags, place, tiny_base, capsys, monkeypatch):
    write_adapter(place / "stray", place / "nothing", 3)
    (place / "stray/adapter_config.json").write_text(
        (place / "stray/adapter_config.json").read_text().replace(str(place / "nothing"), "some/base")
    )
    write_adapter(place / "wide", tiny_base, 3, hidden_size=16)
    write_adapter(place / "long", tiny_base, 3, "a long way to say it " * 3 + "{instruction}")
    (place / "own.jsonl").write_bytes(jsonl({"prompt": "a"}, {"prompt": "b", "adapter": "p0"}))
    (place / "rows.jsonl").write_bytes(
        jsonl({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "正面" * 4})
    )
    assert_line(refused(infer, flags.split(), capsys, monkeypatch, place), REFUSED[flags])


def test_refused_arguments(place):
    model = softprompt.SoftPromptModel.from_pretrained(adapter={"a": "p0", "b": "p1"})
    for names, voting, kind, message in (
        (["a"], None, ConfigError, "an ensemble of a: name two or more adapters"),
        ([], None, ConfigError, "an ensemble of no adapter: name two or more"),
        (["a", "z"], None, AdapterError, "ensemble: unknown adapter 'z'; give one of a, b, none"),
        (["a", "b"], "loud", ConfigError, "voting 'loud' is not one of majority_vote, mean_likelihood"),
    ):
        with pytest.raises(kind, match=message):
            model.ensemble(names, voting)
    with torch.no_grad():
        assert model.ensemble(["a", "none"]).classify(["x"], ["ok", "no"])[0].label in ("ok", "no")
