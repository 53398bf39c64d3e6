"""Rows are classified by the most likely label: which answers are labels, and that scores are those of each alone."""

import pytest
import torch
from helpers.bases import make_bloom
from helpers.small_bases import small_base

from softprompt.data.template import Template
from softprompt.data.tokenization import Example, tokenize
from softprompt.engines.factory import padded_engine
from softprompt.evaluation import classifier as module
from softprompt.evaluation.classifier import Classifier, labels_of_rows
from softprompt.models.capabilities import max_positions
from softprompt.models.loading import freeze


def labels_of(answers: list[str], tokenizer, max_length: int = 256) -> dict[str, str]:
    rows = [{"instruction": "第", "output": answer} for answer in answers]
    return labels_of_rows(rows, tokenize(rows, tokenizer, Template(), max_length), Template())


def test_answers_that_are_labels(tokenizer):
    assert labels_of(["好", "坏"] * 2, tokenizer) == {"好": "好", "坏": "坏"}
    assert labels_of([" 好", "坏", "好", "坏"], tokenizer) == {"好": " 好", "坏": "坏"}
    twenty = [f"{number}" for number in range(20)]
    assert list(labels_of([*twenty, *twenty], tokenizer)) == twenty


@pytest.mark.parametrize(
    "answers",
    [
        ["好"] * 9,  # nothing to tell apart
        ["好", "坏", "ok"],  # a few rows with nearly as many different answers
        [f"{number}" for number in range(19)] * 2 + ["a", "b", "c"],  # too many of them
        ["好", "坏", "", "好", "坏", ""],
        ["好" * 40, "坏" * 40] * 3,  # long answers
    ],
)
def test_answers_that_are_no_labels(answers, tokenizer):
    assert labels_of(answers, tokenizer) == {}


@pytest.mark.parametrize("prompt", [None, torch.randn(3, 32, generator=torch.Generator().manual_seed(1))])
@pytest.mark.parametrize("at_once", [1, 1 << 21])
def test_each_label_is_scored_as_if_alone(at_once, prompt, tokenizer, monkeypatch):
    """In passes of one row, or of all; the loss of a row is that of its own targets, whether truncated or not."""
    monkeypatch.setattr(module, "MAX_TOKENS", at_once)
    engine = padded_engine(freeze(make_bloom(), torch.float32), tokenizer, torch.float32, 200)
    rows = [{"instruction": "第" * n, "output": "正面" if n % 2 else "负面"} for n in (1, 5, 2, 9, 4)]
    data = tokenize(rows, tokenizer, Template(), max(len(e.input_ids) for e in whole(rows, tokenizer)) - 1)
    assert [cut > 0 for cut in data.missing] == [False, False, False, True, False]
    labels = labels_of_rows(rows, data, Template())
    done = list[int]()
    classifier = Classifier.of_rows(rows, labels, Template(), tokenizer)
    found, losses = classifier(engine, prompt, data.examples, done.append)
    assert done == sorted(done) and done[-1] == 5  # rows, whatever the number of labels
    assert losses == pytest.approx([engine.row_losses(prompt, [e])[0] for e in data.examples], rel=1e-5)
    for row, result in zip(rows, found.results, strict=True):
        answers = [whole([{**row, "output": label}], tokenizer)[0] for label in labels]
        scores = -torch.tensor([engine.row_losses(prompt, [answer])[0] for answer in answers])
        assert list(result.probabilities.values()) == pytest.approx(scores.softmax(0).tolist(), rel=1e-4)
        assert result.label == list(labels)[int(scores.argmax())]
    assert found.majority == ("正面", 0.6)
    assert found.confusion_matrix.accuracy == sum(found.correct) / 5


def whole(rows: list[dict], tokenizer) -> list[Example]:
    return list(tokenize(rows, tokenizer, Template(), 1000).examples)


def test_a_longer_label_fits_the_positions_of_the_base(tokenizer):
    """The row's own answer takes the last position, and the other label has more tokens."""
    base = freeze(small_base("gpt2"), torch.float32)
    P, positions = 3, max_positions(base)
    prompt = torch.randn(P, base.get_input_embeddings().embedding_dim)
    rows = [{"instruction": "第", "output": "好"}, {"instruction": "第", "output": "好坏好坏"}] * 2
    examples = [Example([9] * (positions - P - 2) + ids, [-100] * (positions - P - 2) + ids) for ids in ([8, 2],)] * 4
    classifier = Classifier.of_rows(rows, {"好": "好", "好坏好坏": "好坏好坏"}, Template(), tokenizer, positions)
    found, losses = classifier(padded_engine(base, tokenizer, torch.float32), prompt, examples)
    assert len(found.results) == len(losses) == 4
