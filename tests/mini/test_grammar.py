"""The mini base's sentences, tasks, corpus and files. How well prompts tune on it is tested elsewhere."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import pytest
from helpers.handwritten_reviews import REVIEWS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from softprompt.data.template import Template
from softprompt.mini import BASE_DIR, TASKS, rows
from softprompt.mini.corpus import QUESTIONS_BACK, corpus
from softprompt.mini.grammar import held_out, normalized, sentence, sentences
from softprompt.mini.make import SIZES, main, make_model, make_tokenizer
from softprompt.mini.words import RESERVED
from softprompt.utils.errors import DataError

HANDWRITTEN = {normalized(review) for review, _ in REVIEWS}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def pretraining_rows() -> list:
    return list(islice(corpus(0), 20_000))


def instructions(split: str) -> list[str]:
    return [row["instruction"] for row in rows("sentiment", split)]


def test_eval_sentences_are_in_no_training_row() -> None:
    train, evaluation = ({normalized(text) for text in instructions(split)} for split in ("train", "eval"))
    assert len(train) == 6400 and len(evaluation) == 200, "no sentence twice, in whatever punctuation"
    assert not train & evaluation
    assert not train & HANDWRITTEN


def test_eval_sentences_are_in_no_pretraining_text(pretraining_rows) -> None:
    """Each text of a row is looked at line by line, since a request may stand on a line beside the sentence."""
    seen = {normalized(line) for row in pretraining_rows for line in row.user.splitlines()}
    assert not seen & {normalized(text) for text in instructions("eval")}
    assert not seen & HANDWRITTEN


def test_the_corpus_speaks_the_form_that_rows_are_rendered_in(pretraining_rows) -> None:
    bare = [row for row in pretraining_rows if not row.system][:100]
    assert [row.prompt for row in bare] == [Template().render({"instruction": row.user}, None) for row in bare]


def test_the_corpus_holds_out_every_held_out_sentence(pretraining_rows) -> None:
    """By rule, not by list: no bare row of the corpus is one that `held_out` keeps back."""
    bare = [row.user for row in pretraining_rows if row.answer in QUESTIONS_BACK]
    assert len(bare) > 1500
    assert not any(map(held_out, bare))


@pytest.mark.parametrize("ending", ["", "。", "！！", " ~", "…"])
def test_punctuation_does_not_move_a_sentence_to_the_other_side(ending: str) -> None:
    for made in sentences(random.Random(7), 20, held=True):
        assert held_out(made.text.replace("，", " ") + ending)


def test_held_out_sentences_are_a_sixteenth() -> None:
    rng = random.Random(0)
    share = sum(held_out(sentence(rng).text) for _ in range(4000)) / 4000
    assert math.isclose(share, 1 / 16, abs_tol=0.02)


def test_reserved_sentences_are_held_out() -> None:
    assert RESERVED <= HANDWRITTEN
    assert all(map(held_out, RESERVED))


def test_rows_are_bare_and_the_same_every_time() -> None:
    for task in TASKS:
        first = rows(task, n=50)
        assert first == rows(task, n=50)
        assert first != rows(task, n=50, seed=1)
        assert all(set(row) == {"instruction", "input", "output"} and row["input"] == "" for row in first)
        assert all(row["output"] and row["instruction"] == row["instruction"].strip() for row in first)


def test_rows_do_not_depend_on_the_process() -> None:
    """Neither hash randomization nor import order may change them; and no torch is imported to make them."""
    code = (
        "import sys, json; from softprompt.mini import rows; assert 'torch' not in sys.modules;"
        "print(json.dumps(rows('reply', 'eval', 20)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == rows("reply", "eval", 20)


def test_all_tasks_ask_about_the_same_sentences() -> None:
    texts = [[row["instruction"] for row in rows(task, n=100)] for task in TASKS]
    assert len(TASKS) >= 5
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize(
    ("task", "labels", "least", "most"),
    [("sentiment", 2, 0.4, 0.6), ("domain", 13, 0.03, 0.25), ("strength", 3, 0.15, 0.6), ("negation", 2, 0.3, 0.7)],
)
def test_labels_are_balanced(task: str, labels: int, least: float, most: float) -> None:
    counts = Counter(row["output"] for row in rows(task, n=2000))
    assert len(counts) == labels
    assert all(least <= count / 2000 <= most for count in counts.values()), counts


def test_a_subject_and_an_opinion_are_words_of_the_sentence() -> None:
    for made in sentences(random.Random(3), 2000):
        assert made.subject in made.text
        assert made.opinion in made.text or made.opinion.removeprefix("不") in made.text


def test_in_contrasts_the_last_clause_counts() -> None:
    """The word that judges comes after 但是, and the sentiment is the word's."""
    made = [s for s in sentences(random.Random(5), 4000) if "但是" in s.text and not s.opinion.startswith("不")]
    assert len(made) > 50
    assert all(s.opinion in s.text.split("但是")[1] for s in made)


def test_an_unknown_task_is_named_with_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"'sentimant'.*did you mean sentiment.*domain, subject") as raised:
        rows("sentimant")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="train, eval"):
        rows("sentiment", "test")


def test_handwritten_reviews_are_different_and_balanced() -> None:
    assert len(REVIEWS) == len(HANDWRITTEN) >= 60
    assert Counter(label for _, label in REVIEWS).keys() == {"正面", "负面"}


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["👍🏽好", "龘靐齉爩", "naïve café", "  two  spaces\n\n", "𠮷野家", "\u200b\ufeff", "ﷺ"]
)
def test_rare_characters_survive_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_special_tokens_are_blooms(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.padding_side == "left"
    assert tokenizer("好")["input_ids"] == tokenizer("好", add_special_tokens=False)["input_ids"]


def test_the_base_is_small() -> None:
    file = BASE_DIR / "model.safetensors"
    assert file.stat().st_size <= 4 * 2**20
    with safe_open(file, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert 5e5 < sum(math.prod(shape) for shape in shapes.values()) < 2e6
    assert dtypes == {"F16"}


def test_the_tokenizer_is_the_one_that_make_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert make_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_the_shipped_base_is_the_small_one_and_each_larger_one_is_about_twice_the_one_before() -> None:
    made = {name: make_model(0, 1800, size) for name, size in SIZES.items()}
    shipped = AutoConfig.from_pretrained(BASE_DIR)
    for name in ("hidden_size", "n_layer", "n_head", "vocab_size"):
        assert getattr(made["small"].config, name) == getattr(shipped, name)
    counts = [model.num_parameters() for model in made.values()]
    assert all(1.9 < larger / smaller < 2.2 for smaller, larger in pairwise(counts))


def test_make_refuses_a_place_that_is_a_file(tmp_path, capsys) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["--output_dir", str(tmp_path / "taken"), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "--output_dir" in error and error.count("\n") == 1
