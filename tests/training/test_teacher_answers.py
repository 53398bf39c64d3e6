"""The answers of the base with a text: how many are generated at a time, and what two runs at once keep."""

import pytest
import torch

from softprompt.training import teacher_answers
from softprompt.training.teacher_answers import Teacher, answer_questions


class Model:
    """A generator whose answer to each request is one token. It calls `between` before the last answer."""

    def __init__(self, token, between=lambda: None):
        self.token, self.between, self.batches = token, between, []

    def generate(self, requests, batch_size=8, on_token=None):
        self.batches.append(batch_size)
        for number in range(len(requests)):
            if number == len(requests) - 1:
                self.between()
            yield number, [self.token]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answers(model, prefix=(7, 8), samples=2):
    teacher = Teacher(model, torch.zeros(len(prefix), 4), prefix, (2,), None, "a base")
    found = answer_questions(teacher, [[5], [6, 6]], samples, 3, 0, "answers")
    return [[answer.ids for answer in of_question] for of_question in found]


def test_two_runs_at_once_take_the_same_answers(cache):
    """The second run generates all answers while the first one waits for its last one; their answers differ."""
    of_second = []
    first = answers(Model(10, lambda: of_second.extend(answers(Model(20)))))
    assert first == of_second == [[[10], [10]], [[10], [20]]]
    assert answers(Model(30)) == first  # of a run that is resumed


def test_answers_are_kept_in_memory_where_no_file_can_be_written(cache):
    cache.write_text("not a folder")
    assert answers(Model(10)) == [[[10], [10]], [[10], [10]]] and answers(Model(20))[0] == [[20], [20]]


def test_fewer_answers_at_a_time_behind_a_long_text(cache, monkeypatch):
    monkeypatch.setattr(teacher_answers, "MOST_POSITIONS", 200)
    short, long = Model(1), Model(1)
    answers(short)
    answers(long, prefix=range(60))
    assert short.batches == [28] and long.batches == [3]
