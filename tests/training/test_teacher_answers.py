"""The answers of the base with a text: how many are generated at a time, and what two runs at once keep."""

import hashlib
import json

import pytest
import torch

from softprompt.generation.requests import sample_seed
from softprompt.training import teacher_answers
from softprompt.training.teacher_answers import AnswerSource, Teacher, answer_questions, answers_file, kept_answers
from softprompt.utils.errors import Stopped


class Model:
    """A generator whose answer to each request is one token. It calls `between` before the last answer, and `at_first`
    before the first one."""

    def __init__(self, token, between=lambda: None, at_first=lambda: None):
        self.token, self.between, self.at_first, self.batches = token, between, at_first, []

    def generate(self, requests, batch_size=8, on_token=None):
        self.batches.append(batch_size)
        self.at_first()
        for number in range(len(requests)):
            if number == len(requests) - 1:
                self.between()
            yield number, [self.token]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


ROWS = (5,), (6, 6)


def answers(model, prefix=(7, 8), samples=2, rows=ROWS, kept=None, stop=None):
    source = AnswerSource(model, {} if kept is None else kept, stop)
    teacher = Teacher(source, torch.zeros(len(prefix), 4), prefix, (2,), None, "a base")
    found = answer_questions(teacher, rows, samples, 3, 0, "answers")
    return [[answer.ids for answer in of_question] for of_question in found]


def test_two_runs_at_once_take_the_same_answers(cache):
    """The second run generates all answers while the first one waits for its last one; their answers differ."""
    of_second = []
    first = answers(Model(10, lambda: of_second.extend(answers(Model(20)))))
    assert first == of_second == [[[10], [10]], [[10], [20]]]
    assert answers(Model(30)) == first  # of a run that is resumed


def test_more_questions_and_more_answers_leave_those_that_are_known(cache):
    answers(Model(10))
    assert answers(Model(20), rows=((5,), (6, 6), (9,))) == [[[10], [10]], [[10], [10]], [[20], [20]]]
    assert answers(Model(30), samples=3) == [[[10], [10], [30]], [[10], [10], [30]]]
    assert answers(Model(40), prefix=(7,), rows=((8, 5), (8, 6, 6))) == [[[10], [10]], [[10], [10]]]
    assert answers(Model(50), samples=0) == answers(Model(60), samples=0, rows=((6, 6), (5,))) == [[[50]], [[50]]]


def test_inserted_and_reordered_questions_leave_the_answers_of_the_others(cache):
    answers(Model(10))
    assert answers(Model(20), rows=((6, 6), (9,), (5,))) == [[[10], [10]], [[20], [20]], [[10], [10]]]


def test_a_question_that_is_asked_twice_has_other_answers_each_time(cache):
    assert answers(Model(10), rows=((5,),)) == [[[10], [10]]]
    assert answers(Model(20), rows=((5,), (5,))) == [[[10], [10]], [[20], [20]]]


def test_a_time_limit_ends_the_answering_and_keeps_what_there_is(cache):
    class Limit:
        exit_code = None

    limit = Limit()
    with pytest.raises(Stopped, match="3 answers"):
        answers(Model(10, at_first=lambda: setattr(limit, "exit_code", 124)), stop=limit)
    assert answers(Model(20), stop=Limit()) == [[[10], [20]], [[20], [20]]]
    limit.exit_code = 124
    assert answers(Model(30), stop=limit) == [[[10], [20]], [[20], [20]]]  # nothing is left to generate


def test_a_run_keeps_its_own_answers(cache, tmp_path):
    """They are used before those of the cache, which another machine may have made."""
    kept = {}
    first = answers(Model(10), kept=kept)
    (tmp_path / "teacher_answers.jsonl").write_bytes(answers_file(kept))
    for file in cache.rglob("*.jsonl"):
        file.unlink()
    assert answers(Model(20)) != first
    again = kept_answers(tmp_path)
    assert answers(Model(30), kept=again, rows=((5,), (6, 6), (9,))) == [*first, [[30], [30]]] and len(again) == 6
    assert kept_answers(tmp_path / "nowhere") == {}


def test_a_run_of_an_earlier_version_is_resumed_with_its_answers(cache):
    """Its keys had the seeds of the questions' indices, and these settings."""
    how = {
        **{"max_length": 256, "max_new_tokens": 3, "do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0},
        **{"min_p": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": []},
        **{"stop_strings": [], "eos_token_id": [2], "num_return_sequences": 1, "num_beams": 1},
    }
    keys = [json.dumps([[7, 8, *row], how, sample_seed(0, n, s)]) for n, row in enumerate(ROWS) for s in (0, 1)]
    kept = {hashlib.blake2b(key.encode(), digest_size=16).hexdigest(): [n] for n, key in enumerate(keys)}
    assert answers(Model(9), kept=kept) == [[[0], [1]], [[2], [3]]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:30],
        lambda line: line.replace(b"[10]", b"[11]"),
        lambda line: line.replace(b"[10]", b"[-1]"),
        lambda line: line.replace(b"[10]", b"[10, 10, 10, 10, 10]"),
        lambda line: b"[" * 200_000 + b"\n",
        lambda line: b"[1, [99999999999999999999999999]]\n",
    ],
)
def test_a_damaged_line_is_generated_again_and_kept(damage, cache):
    """Also if it is the only one, and not whole."""
    answers(Model(10), samples=0, rows=((5,),))
    (file,) = cache.rglob("*.jsonl")
    file.write_bytes(damage(file.read_bytes()))
    assert answers(Model(20), samples=0) == answers(Model(30), samples=0) == [[[20]], [[20]]]


@pytest.mark.parametrize("ids", ["[-1]", "[99999999999999999999999999]", '"12"'])
def test_a_line_of_an_earlier_version_has_no_hash(ids, tmp_path):
    (tmp_path / "teacher_answers.jsonl").write_text(f'["a", [1, 2]]\n["b", {ids}]\n', encoding="utf-8")
    assert kept_answers(tmp_path) == {"a": [1, 2]}


def test_a_question_without_room_gets_no_answer(cache):
    assert answers(Model(10), rows=(None, (5,), None)) == [[], [[10], [10]], []]
    assert answers(Model(20), rows=((5,), (6,))) == [[[10], [10]], [[20], [20]]]


def test_answers_are_kept_in_memory_where_no_file_can_be_written(cache):
    cache.write_text("not a folder")
    assert answers(Model(10)) == [[[10], [10]], [[10], [10]]] and answers(Model(20))[0] == [[20], [20]]


def test_fewer_answers_at_a_time_behind_a_long_text(cache, monkeypatch):
    monkeypatch.setattr(teacher_answers, "MOST_POSITIONS", 200)
    short, long = Model(1), Model(1)
    answers(short)
    answers(long, prefix=range(60))
    assert short.batches == [28] and long.batches == [3]
